"""`hipserve lab budgets`: how many keys each layer and KV head needs, at the same mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hipserve.cli import options
from hipserve.cli.files import make_room, write
from hipserve.cli.lab_shared import Length, Svg, check_svg, show_report
from hipserve.cli.numbers import at_least
from hipserve.cli.output import result, say
from hipserve.cli.steps import Steps

Texts = Annotated[
    list[Path],
    typer.Option(
        parser=options.parse_path,
        metavar="FILE",
        help="Text or .jsonl files, or @licenses or @sources. Repeatable.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        parser=options.parse_path, metavar="FILE", help="TOML or JSON file to write, for --config."
    ),
]


def budgets(
    text: Texts,
    model: options.Model = None,
    length: Length = 32768,
    documents: Annotated[
        int,
        typer.Option(
            parser=at_least(2), metavar="N", help="Documents to read; half of them choose."
        ),
    ] = 4,
    out: Out = None,
    budget: options.Budget = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    svg: Svg = None,
    json: options.Json = False,
) -> None:
    """Finds a budget for each layer and KV head, with the same mean and a smaller error.

    Some heads need many keys and others few. Half of the documents choose, the other half report.
    """
    base = options.make_config(config, preset, budget)
    check_svg(svg)
    make_room("--out", out)
    from hipserve.lab import read_documents
    from hipserve.lab.budgets.report import find_budgets
    from hipserve.lab.budgets.shown import advice, charts, grids

    texts = read_documents(text)
    loaded = options.load_model(model, base, device, dtype)
    with Steps("measuring …") as shown:
        report = find_budgets(
            loaded, base, texts, length=length, count=documents, progress=shown.update
        )
    if out:
        form = "toml" if out.suffix.lower() == ".toml" else "json"
        write("--out", out, report.config.dumps(form))
        say(f"written: {out}")
    show_report(report.to_dict(), grids(report), charts(report), svg=svg, json=json)
    if not json:
        if not out:
            result(report.config.dumps())
        result(advice(report, out))
