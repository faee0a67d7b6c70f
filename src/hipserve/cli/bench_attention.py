"""`hipserve bench attention`: speed of one layer compared with dense attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.files import make_room, write
from hipserve.cli.numbers import (
    at_least,
    format_count,
    format_ratio,
    format_seconds,
    parse_counts,
)
from hipserve.cli.output import result, result_json, show
from hipserve.cli.steps import Steps
from hipserve.errors import ArgumentError, did_you_mean

if TYPE_CHECKING:
    import torch

    from hipserve.lab import AttentionReport, Clock, LayerShape, Phase, Point

_DENSE = {"native": "our kernel", "sdpa": "torch's SDPA"}

Heads = Annotated[str, typer.Option(metavar="Q/KV", help="Query and KV heads of the layer.")]
HeadDim = Annotated[int, typer.Option(parser=at_least(1), metavar="N")]
Precision = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Rounds = Annotated[
    int, typer.Option(parser=at_least(1), metavar="N", help="Maximum repetitions of a call.")
]
Threads = Annotated[
    int | None,
    typer.Option(parser=at_least(1), metavar="N", help="Threads; all cores if left out."),
]
ClockName = Annotated[str, typer.Option(help="wall, or cpu with one thread.")]
Csv = Annotated[
    Path | None,
    typer.Option(parser=options.parse_path, metavar="FILE", help="CSV file for every time."),
]


def attention(
    lengths: Annotated[str, typer.Option(metavar="TOKENS,…")] = "8k,16k,32k,64k,128k",
    phase: Annotated[str, typer.Option(help="prefill, decode or both.")] = "both",
    heads: Heads = "32/8",
    head_dim: HeadDim = 128,
    dtype: Precision = "bfloat16",
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    backend: Annotated[str, typer.Option(help="auto, cpu or reference.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu.")] = "cpu",
    rounds: Rounds = 7,
    threads: Threads = None,
    clock: ClockName = "wall",
    csv: Csv = None,
    json: options.Json = False,
) -> None:
    """One layer: HiP attention, our dense kernel and torch's SDPA, checked and then timed."""
    base = options.make_config(config, preset, budget, selector)
    make_room("--csv", csv)
    import torch

    from hipserve.lab import Limits, bench_attention

    if threads:
        torch.set_num_threads(threads)
    with Steps("checking …") as shown:
        report = bench_attention(
            parse_counts(lengths),
            phases=_phases(phase),
            shape=parse_shape(heads, head_dim),
            dtype=parse_dtype(dtype),
            config=base,
            backend=backend,
            device=device,
            limits=Limits(rounds=rounds, clock=parse_clock(clock)),
            progress=lambda text: shown.update(f"{text} …"),
        )
    if csv:
        write("--csv", csv, report.to_csv())
    if json:
        result_json(report.to_dict())
    else:
        _show(report)


def _phases(text: str) -> tuple[Phase, ...]:
    known: dict[str, tuple[Phase, ...]] = {
        "both": ("prefill", "decode"),
        "prefill": ("prefill",),
        "decode": ("decode",),
    }
    if text not in known:
        raise ArgumentError(
            "phase", f"one of {', '.join(known)}", repr(text), did_you_mean(text, known)
        )
    return known[text]


def parse_clock(text: str) -> Clock:
    """What times are read from, by name."""
    if text != "wall" and text != "cpu":
        raise ArgumentError("clock", "wall or cpu", repr(text))
    return text


def parse_shape(heads: str, head_dim: int) -> LayerShape:
    """The heads of a layer, from 32/8."""
    from hipserve.lab import LayerShape

    counts = heads.split("/")
    if len(counts) != 2 or not all(count.isdecimal() for count in counts):
        raise ArgumentError("heads", "query heads/KV heads", repr(heads), "such as 32/8")
    return LayerShape(int(counts[0]), int(counts[1]), head_dim)


def parse_dtype(name: str) -> torch.dtype:
    """A precision by name."""
    import torch

    names = ("bfloat16", "float16", "float32")
    if name not in names:
        raise ArgumentError(
            "dtype", f"one of {', '.join(names)}", repr(name), did_you_mean(name, names)
        )
    return getattr(torch, name)


def _show(report: AttentionReport) -> None:
    result(_heading(report))
    if points := report.of("prefill"):
        show(_prefill_table(report, points))
        result(_exponents(report, "prefill"))
    if points := report.of("decode"):
        show(_decode_table(report, points))
        result(_exponents(report, "decode"))


def _heading(report: AttentionReport) -> str:
    made, shape, config = report.provenance, report.shape, report.config
    worst = max(report.checks, key=lambda c: c.error / c.allowed if c.allowed else c.error)
    return "\n".join(
        (
            f"numeric check: {len(report.checks)} of {len(report.checks)} passed; "
            f"nearest its limit: {worst.name}, error {worst.error:.2g} of {worst.allowed:.2g}",
            f"machine: {made.cpu}, {made.isa}, "
            f"{made.threads} {_plural(made.threads)}, {made.clock} clock, torch {made.torch}, "
            f"hipserve {made.hipserve} {made.commit}".rstrip(),
            f"layer: {shape.num_q_heads}/{shape.num_kv_heads} heads of {shape.head_dim}, "
            f"{report.dtype}, selector {config.selector}, budget {config.budget}, "
            f"backend {report.backend}",
            f"this machine: dense by {_DENSE[report.dense_kernel]}, pruned from "
            f"{config.dense_below} tokens on, decode steps from {config.decode_dense_below}",
        )
    )


def _plural(threads: int) -> str:
    return "thread" if threads == 1 else "threads"


def _prefill_table(report: AttentionReport, points: list[Point]) -> Table:
    ran = sorted({point.timings["hip"].heads_timed for point in points})
    title = (
        f"prefill of one layer ({' or '.join(map(str, ran))} of {report.shape.num_q_heads} query "
        "heads ran, with all\ncontenders; the times are scaled)"
    )
    columns = ("HiP", "ours dense", "SDPA", "x ours", "x SDPA", "index", "select")
    table = _table(title, *columns)
    for point in points:
        table.add_row(
            format_count(point.length),
            format_seconds(point.seconds("hip")) + ("*" if point.reads_all else ""),
            *(format_seconds(point.seconds(name)) for name in ("dense", "sdpa")),
            *(format_ratio(point.ratio(name, "hip")) for name in ("dense", "sdpa")),
            *(
                "-" if point.reads_all else f"{point.share(part):.1%}"
                for part in ("index", "select")
            ),
        )
    table.caption = _footnote(report, points)
    return table


def _footnote(report: AttentionReport, points: list[Point]) -> str | None:
    """What HiP's time measures where nothing is pruned."""
    if not any(point.reads_all for point in points):
        return None
    kernel = report.dense_kernel if points[0].phase == "prefill" else "native"
    return f"* HiP reads everything: a call of the dense path, {_DENSE[kernel]}"


def _decode_table(report: AttentionReport, points: list[Point]) -> Table:
    every = report.config.refresh_interval
    title = f"one decode step of one layer, selecting at every step or every {every}; keys cold"
    heads = ("every", f"every {every}", "ours dense", "SDPA", "x ours", "x SDPA", "select")
    if every == 1:  # the second column would equal the first
        title = "one decode step of one layer, selecting at every step; keys cold"
        heads = ("HiP", *heads[2:])
    table = _table(title, *heads)
    ours = ("hip", "hip reused") if every > 1 else ("hip",)
    for point in points:
        mark = "*" if point.reads_all else ""
        table.add_row(
            format_count(point.length),
            *(format_seconds(point.seconds(name)) + mark for name in ours),
            *(format_seconds(point.seconds(name)) for name in ("dense", "sdpa")),
            *(
                "/".join(format_ratio(point.ratio(base, name)) for name in ours)
                for base in ("dense", "sdpa")
            ),
            "-" if point.reads_all else f"{point.share('select'):.1%}",
        )
    table.caption = _footnote(report, points)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title)
    table.title_justify = table.caption_justify = "left"
    for column in ("tokens", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _exponents(report: AttentionReport, phase: Phase) -> str:
    fits = {name: report.exponent(phase, name) for name in report.of(phase)[0].timings}
    shown = ("hip", "hip reused", "dense", "sdpa")
    parts = [f"{name} {fits[name]:.2f}" for name in shown if fits.get(name) is not None]
    return f"time ~ tokens^e from 8k on: {', '.join(parts)}" if parts else ""
