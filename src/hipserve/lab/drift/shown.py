"""Drift as a table."""

from __future__ import annotations

from hipserve.lab.drift.measure import DriftReport
from hipserve.lab.drift.summary import Summary
from hipserve.lab.shown import Grid, counted, with_interval


def grid(report: DriftReport) -> Grid:
    """Bare prompts, then each attention: everything, by length, by place, and by label."""
    title = f"{report.model}, {counted(report.prompts, 'prompt')}, compared with dense attention"
    caption = (
        "KL of the first token in nats, with its verdict; flips: another likeliest first token; "
        "log-odds: of contrasts, and those decided the other way and back; followed: instructions "
        "under dense attention and under this, lost and gained"
    )
    headings = ["attention", "contexts", "KL", "flips", "log-odds", "followed", "verdict"]
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
    return [str(row.contexts), kl, f"{row.flips:.0%}", shift, followed, row.decision or ""]
