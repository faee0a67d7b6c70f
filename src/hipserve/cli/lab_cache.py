"""`hipserve lab cache`: hits of caches of blocks, on traces of real decode steps."""

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
from hipserve.cli.numbers import at_least, parse_counts
from hipserve.cli.steps import Steps


def cache(
    model: options.Model = None,
    length: Length = 8192,
    text: Text = None,
    samples: Samples = 1,
    steps: Annotated[
        int, typer.Option(parser=at_least(2), metavar="N", help="Decode steps of each text.")
    ] = 64,
    capacities: Annotated[
        str, typer.Option(metavar="N,N,…", help="Sizes of a head's cache, in selections.")
    ] = "1,2,4,8",
    refresh: Annotated[
        str, typer.Option(metavar="N,N,…", help="Numbers of steps that share a selection.")
    ] = "1,8",
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
    """Share of the chosen blocks that a cache would hold, by size, policy and refresh interval.

    Decode steps of the model record which blocks they choose; LRU, clock, frequency and Belady's
    optimum are simulated on that, for every layer and head.
    """
    base = options.make_config(config, preset, budget, selector)
    sizes, intervals = parse_counts(capacities), parse_counts(refresh)
    check_svg(svg)
    from hipserve.lab.cache.report import measure_cache
    from hipserve.lab.cache.shown import charts, grids

    loaded = options.load_model(model, base, device, dtype)
    chosen = read_samples(loaded, text, length, samples, seed)
    with Steps("recording …") as shown:
        report = measure_cache(
            loaded,
            base,
            chosen,
            steps=steps,
            capacities=sizes,
            intervals=intervals,
            progress=shown.update,
        )
    show_report(report.to_dict(), grids(report), charts(report), svg=svg, json=json)
