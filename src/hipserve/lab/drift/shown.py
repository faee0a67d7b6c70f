"""Drift as tables."""

from __future__ import annotations

from hipserve.lab.drift.measure import DriftReport
from hipserve.lab.drift.summary import Summary, summarize
from hipserve.lab.intervals import mean
from hipserve.lab.shown import Grid, counted, with_interval


def grids(report: DriftReport) -> list[Grid]:
    """All of it, instructions by number and distance, and the system prompt by layer."""
    return [_grid(report), *_instructions(report), *_reads(report)]


def _grid(report: DriftReport) -> Grid:
    """Bare prompts, then each attention: everything, by length, by place, and by label."""
    title = f"{report.model}, {counted(report.prompts, 'prompt')}, compared with dense attention"
    caption = (
        "KL of the first token in nats, with its verdict; flips: another likeliest first token; "
        "log-odds: of contrasts, and those decided the other way and back; followed: instructions "
        "under dense attention and under this, lost and gained; system: share of the system prompt "
        "that rows of the answer read, mean over layers"
    )
    headings = ["attention", "contexts", "KL", "flips", "log-odds", "followed", "system", "verdict"]
    rows = [["bare", *_cells(report.bare)]]
    for name, row in report.rows.items():
        rows.append([name, *_cells(row)])
        lengths, places, labels = (
            by[name] for by in (report.by_length, report.by_place, report.by_label)
        )
        rows += [[f"- {length:,} tokens", *_cells(own)] for length, own in lengths.items()]
        rows += [[f"- {place} the text", *_cells(own)] for place, own in places.items()]
        if len(labels) > 1:
            rows += [[f"- {label}", *_cells(own)] for label, own in labels.items()]
    return Grid(title, headings, rows, caption)


def _cells(row: Summary) -> list[str]:
    shift = followed = ""
    if row.shift is not None:
        shift = f"{row.shift:+.2f} ({row.decisions[0]}, {row.decisions[1]})"
    if row.followed:
        dense, own = row.followed
        followed = f"{dense:.0%}, {own:.0%} (-{row.lost}, +{row.gained})"
    kl = with_interval(row.kl, row.kl_interval)
    flips, reads = f"{row.flips:.0%}", _share([*row.reads.values()])
    return [str(row.contexts), kl, flips, shift, followed, reads, row.decision or ""]


def _instructions(report: DriftReport) -> list[Grid]:
    """Nothing without instructions that are checked, or with one group and one length."""
    checked = [r for r in report.records if r.followed and r.attention in report.rows]
    labels = dict.fromkeys(record.label for record in checked)
    if len(labels) * len(report.lengths) < 2:
        return []

    def cell(name: str, label: str, length: int) -> str:
        own = [r for r in checked if (r.attention, r.label, r.length) == (name, label, length)]
        followed = summarize(own).followed
        return f"{followed[0]:.0%}, {followed[1]:.0%}" if followed else ""

    rows = [
        [name, label, *(cell(name, label, length) for length in report.lengths)]
        for name in report.rows
        for label in labels
    ]
    headings = ["attention", "prompts", *(f"{length:,} tokens" for length in report.lengths)]
    caption = "Under dense attention and under this"
    return [Grid("Instructions followed, by distance", headings, rows, caption)]


def _reads(report: DriftReport) -> list[Grid]:
    """Nothing without system prompts."""
    layers = dict.fromkeys(n for row in report.rows.values() for n in row.reads)
    if not layers:
        return []
    rows = [[str(n), *(_share([row.reads[n]]) for row in report.rows.values())] for n in layers]
    caption = "Sinks, chosen blocks and window; mean over heads, rows and contexts"
    title = "The share of the system prompt that rows of the answer read"
    return [Grid(title, ["layer", *report.rows], rows, caption)]


def _share(shares: list[float]) -> str:
    return f"{mean(shares):.0%}" if shares else ""
