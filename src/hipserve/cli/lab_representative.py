"""`hipserve lab representative`: which key may stand for a range, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from hipserve.cli import options
from hipserve.cli.lab_shared import (
    Length,
    Samples,
    Svg,
    Text,
    check_svg,
    read_samples,
    show_report,
)
from hipserve.cli.numbers import at_least
from hipserve.cli.steps import Steps


def representative(
    model: options.Model = None,
    length: Length = 8192,
    text: Text = None,
    samples: Samples = 1,
    rows: Annotated[
        int, typer.Option(parser=at_least(1), metavar="N", help="Query rows of each text.")
    ] = 16,
    seed: options.Seed = 0,
    budget: options.Budget = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    svg: Svg = None,
    json: options.Json = False,
) -> None:
    """Splits of ranges that first, middle, last, random keys and means get right, and recall.

    Beside each share stands what the correlation of scores by distance predicts alone.
    """
    base = options.make_config(config, preset, budget)
    check_svg(svg)
    from hipserve.lab.representative.report import measure_representatives
    from hipserve.lab.representative.shown import charts, grids

    loaded = options.load_model(model, base, device, dtype)
    chosen = read_samples(loaded, text, length, samples, seed)
    with Steps("recording …") as shown:
        report = measure_representatives(loaded, base, chosen, rows=rows, progress=shown.update)
    show_report(report.to_dict(), grids(report), charts(report), svg=svg, json=json)
