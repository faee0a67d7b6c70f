"""`hipserve lab drift`: prompts behind, inside and before long texts, pinned and unpinned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.comparison import Text, say_what_is_dense
from hipserve.cli.numbers import format_count, parse_counts
from hipserve.cli.output import err, result, result_json, say, show

if TYPE_CHECKING:
    from hipserve.lab import DriftReport
    from hipserve.lab.drift.summary import Summary

Prompts = Annotated[
    Path | None,
    typer.Option(
        parser=options.parse_path,
        metavar="FILE",
        help="JSON lines with prompt and, where known, system, label, expect and contrast; twelve "
        "harmless ones if left out.",
    ),
]
HEADINGS = ("contexts", "KL", "flips", "log-odds", "followed", "verdict")


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

    chosen = read_prompts(prompts) if prompts else DEFAULT_PROMPTS
    filler = read_documents(text or ())
    loaded = options.load_model(model, base, device, dtype)
    with err.status("measuring …") as status:
        report = evaluate_drift(
            loaded,
            base,
            chosen,
            filler,
            lengths=counts,
            progress=lambda prompt, name: status.update(f"{prompt} of {len(chosen)} ({name})"),
        )
    say_what_is_dense(loaded, {"hip": base}, min(counts))
    for warning in report.warnings:
        say(warning, style="yellow")
    if json:
        result_json(report.to_dict())
        return
    result(report.scope)
    show(_table(report))


def _table(report: DriftReport) -> Table:
    table = Table("attention", *HEADINGS)
    table.title = f"{report.model}, {report.prompts} prompts, compared with dense attention"
    table.caption = (
        "KL of the first token in nats, with its verdict; flips: another likeliest first token; "
        "log-odds: of contrasts, and those decided the other way and back; followed: instructions "
        "under dense attention and under this, lost and gained"
    )
    table.add_row("bare", *_cells(report.bare))
    for name, row in report.rows.items():
        table.add_section()
        table.add_row(name, *_cells(row))
        for length, own in report.by_length[name].items():
            table.add_row(f" {format_count(length)} tokens", *_cells(own))
        for place, own in report.by_place[name].items():
            table.add_row(f" {place} the text", *_cells(own))
    return table


def _cells(row: Summary) -> list[str]:
    spread = f" ±{(row.kl_interval[1] - row.kl_interval[0]) / 2:.3f}" if row.kl_interval else ""
    shift = (
        "" if row.shift is None else f"{row.shift:+.2f} ({row.decisions[0]}, {row.decisions[1]})"
    )
    followed = ""
    if row.followed:
        dense, own = row.followed
        followed = f"{dense:.0%}, {own:.0%} (-{row.lost}, +{row.gained})"
    first = [str(row.contexts), f"{row.kl:.3f}{spread}", f"{row.flips:.0%}"]
    return [*first, shift, followed, row.decision or ""]
