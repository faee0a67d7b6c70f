"""The speed of a machine's backends and tiers as tables, sentences and charts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hipserve.lab.shown import Chart, Grid, Line
from hipserve.lab.speed.machine import MachineReport, TierReport, gain
from hipserve.lab.speed.report import Phase, Point

PHASES: tuple[Phase, ...] = ("prefill", "decode")
PARTS = ("index", "select", "attend")
"""What a pruned call does, one after the other; a decode step's index is part of its write."""


def grids(report: MachineReport) -> list[Grid]:
    """For each phase: what pruning gains; then what its parts take."""
    return [*(_gains(report, phase) for phase in PHASES), *(_parts(report, p) for p in PHASES)]


def _gains(report: MachineReport, phase: Phase) -> Grid:
    rows = [
        [
            tier.name,
            _tokens(tier.crossover(phase)),
            _tokens(tier.used[phase]),
            *(_gain(tier, phase, length) for length in report.lengths),
        ]
        for tier in report.tiers
    ]
    made, last = report.tiers[-1].measured, report.tiers[-1].measured.provenance
    heads = f"{made.shape.num_q_heads}/{made.shape.num_kv_heads} heads of {made.shape.head_dim}"
    title = f"{phase}: how many times as long dense attention takes"
    caption = (
        f"{last.cpu}, threads: {last.threads}, {last.clock} clock, {made.dtype}, {heads}, "
        f"budget {made.config.budget}; the faster dense kernel, ours or torch's; "
        "-: too short to prune, or not measured"
    )
    lengths = [f"{length:,}" for length in report.lengths]
    return Grid(title, ["tier", "pays from", "hipserve prunes from", *lengths], rows, caption)


def _parts(report: MachineReport, phase: Phase) -> Grid:
    """Milliseconds at the longest length that every tier but the reference has."""
    rows = [
        [tier.name, *(_milliseconds(point, name) for name in _timed(phase))]
        for tier, point in _longest(report, phase)
    ]
    title = f"{phase} of {report.lengths[-1]:,} tokens, milliseconds"
    return Grid(title, ["tier", "pruned", *_timed(phase)[1:]], rows)


def _timed(phase: Phase) -> tuple[str, ...]:
    parts = PARTS if phase == "prefill" else PARTS[1:]
    return ("hip", *parts, "dense", "sdpa")


def sentences(report: MachineReport) -> list[str]:
    """The gate, and which part of each phase hangs most on the tier."""
    checks = sum(len(tier.measured.checks) for tier in report.tiers)
    found = [f"numeric checks against float64: {checks} of {checks} passed"]
    for phase in PHASES:
        points = [point for _, point in _longest(report, phase)]
        if len(points) > 1 and not points[0].reads_all:
            spread = {
                name: points[0].seconds(name) / points[-1].seconds(name)
                for name in _timed(phase)[1:-1]
            }
            parts = ", ".join(f"{name} {value:.1f}x" for name, value in spread.items())
            found.append(f"{phase}, slowest native tier against the fastest: {parts}")
    return found


def charts(report: MachineReport) -> list[Chart]:
    """Gain against length, a line for each tier."""
    return [
        Chart(
            phase,
            "tokens",
            "dense / pruned",
            [
                Line(tier.name, [p.length for p in points], [gain(p) for p in points])
                for tier in report.tiers
                if (points := _pruned(tier, phase))
            ],
            log_x=True,
            log_y=True,
        )
        for phase in PHASES
    ]


def _longest(report: MachineReport, phase: Phase) -> Iterator[tuple[TierReport, Point]]:
    """Tiers that have the longest length, with it."""
    for tier in report.tiers:
        for point in tier.measured.of(phase):
            if point.length == report.lengths[-1]:
                yield tier, point


def _pruned(tier: TierReport, phase: Phase) -> Sequence[Point]:
    return [point for point in tier.measured.of(phase) if not point.reads_all]


def _gain(tier: TierReport, phase: Phase, length: int) -> str:
    found = [gain(point) for point in _pruned(tier, phase) if point.length == length]
    return f"{found[0]:.2f}" if found else "-"


def _milliseconds(point: Point, name: str) -> str:
    return f"{1000 * point.seconds(name):.3g}"


def _tokens(count: int | None) -> str:
    return "never" if count is None else f"{count:,}"
