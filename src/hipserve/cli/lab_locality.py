"""`hipserve lab locality`: is attention local, in which domain, and does it matter?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hipserve.cli import options
from hipserve.cli.lab_shared import (
    Length,
    Samples,
    Svg,
    check_svg,
    read_samples,
    show_report,
    text_option,
)
from hipserve.cli.numbers import at_least
from hipserve.cli.steps import Steps

Text = Annotated[
    list[Path] | None,
    text_option(
        "code, documentation, licences, tables, identifiers, prose, mathematics and a mixture of "
        "them, of every machine"
    ),
]


def locality(
    model: options.Model = None,
    length: Length = 8192,
    text: Text = None,
    samples: Samples = 1,
    rows: Annotated[
        int, typer.Option(parser=at_least(1), metavar="N", help="Query rows of each text.")
    ] = 16,
    losses: Annotated[
        int,
        typer.Option(
            parser=at_least(0),
            metavar="N",
            help="Texts to read once for each head, pruned alone; 0 for none.",
        ),
    ] = 1,
    heads: Annotated[
        int | None,
        typer.Option(
            parser=at_least(2),
            metavar="N",
            help="KV heads to prune, spread evenly over all of them; all if left out.",
        ),
    ] = None,
    seed: options.Seed = 0,
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    svg: Svg = None,
    json: options.Json = False,
) -> None:
    """How far keys that matter lie together, by domain and head, and whether that predicts loss.

    Random identifiers, in which nothing repeats, are the control.
    """
    base = options.make_config(config, preset, budget, selector)
    check_svg(svg)
    from hipserve.lab.locality.report import measure_locality
    from hipserve.lab.locality.shown import charts, grids
    from hipserve.lab.samples import locality_documents

    loaded = options.load_model(model, base, device, dtype)
    chosen = read_samples(loaded, text, length, samples, seed, locality_documents)
    with Steps("recording …") as shown:
        report = measure_locality(
            loaded, base, chosen, rows=rows, losses=losses, limit=heads, progress=shown.update
        )
    show_report(report.to_dict(), grids(report), charts(report), svg=svg, json=json)
