"""`hipserve lab speed`: from where on pruning pays on this machine, and how much."""

from __future__ import annotations

from typing import Annotated

import typer

from hipserve.cli import options
from hipserve.cli.bench_attention import (
    ClockName,
    HeadDim,
    Heads,
    Precision,
    Rounds,
    Threads,
    parse_clock,
    parse_dtype,
    parse_shape,
)
from hipserve.cli.lab_shared import Svg, check_svg, show_grids, write_svg
from hipserve.cli.numbers import parse_counts
from hipserve.cli.output import result, result_json
from hipserve.cli.steps import Steps


def speed(
    lengths: Annotated[str, typer.Option(metavar="TOKENS,…")] = "2k,4k,8k,16k,32k",
    tiers: Annotated[
        str,
        typer.Option(
            metavar="NAME,…", help="reference and ISA tiers, such as avx2; all if left out."
        ),
    ] = "",
    heads: Heads = "32/8",
    head_dim: HeadDim = 128,
    dtype: Precision = "bfloat16",
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    rounds: Rounds = 7,
    threads: Threads = None,
    clock: ClockName = "wall",
    svg: Svg = None,
    json: options.Json = False,
) -> None:
    """Crossovers and ratios to dense attention, on every backend and ISA tier of this CPU.

    Every row is pruned, checked against float64 and then timed, as `bench attention` does.
    """
    base = options.make_config(config, preset, budget, selector)
    check_svg(svg)
    import torch

    from hipserve.lab import Limits
    from hipserve.lab.speed.machine import measure_machine
    from hipserve.lab.speed.shown import charts, grids, sentences

    if threads:
        torch.set_num_threads(threads)
    with Steps("checking …") as shown:
        report = measure_machine(
            parse_counts(lengths),
            tiers=[name.strip() for name in tiers.split(",") if name.strip()],
            shape=parse_shape(heads, head_dim),
            dtype=parse_dtype(dtype),
            config=base,
            limits=Limits(rounds=rounds, clock=parse_clock(clock)),
            progress=lambda text: shown.update(f"{text} …"),
        )
    write_svg(svg, charts(report))
    if json:
        result_json(report.to_dict())
        return
    show_grids(grids(report))
    for sentence in sentences(report):
        result(sentence)
