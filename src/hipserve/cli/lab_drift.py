"""`hipserve lab drift`: prompts behind, inside and before long texts, pinned and unpinned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hipserve.cli import options
from hipserve.cli.comparison import Text, say_what_is_dense
from hipserve.cli.lab_shared import show_grids
from hipserve.cli.numbers import parse_counts
from hipserve.cli.output import result, result_json, say
from hipserve.cli.steps import Steps

Prompts = Annotated[
    Path | None,
    typer.Option(
        parser=options.parse_path,
        metavar="FILE",
        help="JSON lines with prompt and, where known, system, label, expect and contrast; sixteen "
        "harmless ones if left out.",
    ),
]


def drift(
    model: options.Model = None,
    prompts: Prompts = None,
    lengths: Annotated[
        str, typer.Option(metavar="A,B,…", help="Lengths of contexts in tokens.")
    ] = "8k,32k",
    text: Text = None,
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    json: options.Json = False,
) -> None:
    """First tokens, decisions and instructions behind long texts, system prompt pinned or not.

    Bare prompts have to be the same as under dense attention; what is blind has to be caught.
    """
    base = options.make_config(config, preset, budget, selector)
    counts = parse_counts(lengths)
    from hipserve.lab import evaluate_drift, read_documents
    from hipserve.lab.drift.prompts import DEFAULT_PROMPTS, read_prompts
    from hipserve.lab.drift.shown import grids

    chosen = read_prompts(prompts) if prompts else DEFAULT_PROMPTS
    filler = read_documents(text or ())
    loaded = options.load_model(model, base, device, dtype)
    with Steps("measuring …") as shown:
        report = evaluate_drift(
            loaded,
            base,
            chosen,
            filler,
            lengths=counts,
            progress=lambda prompt, name: shown.update(f"{prompt} of {len(chosen)} ({name})"),
        )
    say_what_is_dense(loaded, {"hip": base}, min(counts))
    for warning in report.warnings:
        say(warning, style="yellow")
    if json:
        result_json(report.to_dict())
        return
    result(report.scope)
    show_grids(grids(report))
