"""Hit ratios as tables and charts."""

from __future__ import annotations

from typing import Any

from hipserve.lab.cache.report import CacheReport
from hipserve.lab.shown import Chart, Grid, Line, counted, with_error

MIB = 2**20


def grids(report: CacheReport) -> list[Grid]:
    """By policy and refresh interval, and then by domain and layer under the first policy."""
    return [_by_policy(report), *_by_field(report)]


def _by_policy(report: CacheReport) -> Grid:
    capacities = report.values("capacity")
    rows = [
        [policy, str(interval), *(_cell(report, policy, interval, size) for size in capacities)]
        for interval in report.values("interval")
        for policy in report.values("policy")
    ]
    caption = (
        f"{counted(len(report.samples), 'text')} of {report.length:,} tokens, their last "
        f"{report.steps} as decode steps. A cache holds so many selections of its head, "
        f"{report.max_selected} blocks each on average. Share of blocks that it held; the same "
        "weighted by attention; MiB that a step loads."
    )
    shares = [f"{size}x, {report.share_of_keys(size):.0%} of keys" for size in capacities]
    title = f"{report.model}: hits of a cache of blocks"
    return Grid(title, ["policy", "refresh", *shares], rows, caption)


def _cell(report: CacheReport, policy: str, interval: int, capacity: int) -> str:
    where: dict[str, Any] = {"policy": policy, "interval": interval, "capacity": capacity}
    hits, weighted = report.ratio(**where), report.ratio(weighted=True, **where)
    return f"{with_error(hits)}; {weighted.value:.3f}; {report.bytes_per_step(**where) / MIB:.2f}"


def _by_field(report: CacheReport) -> list[Grid]:
    capacities = report.values("capacity")
    policy, interval = report.values("policy")[0], report.values("interval")[0]

    def cells(where: dict[str, Any]) -> list[str]:
        fixed: dict[str, Any] = {**where, "policy": policy, "interval": interval}
        return [with_error(report.ratio(capacity=size, **fixed)) for size in capacities]

    return [
        Grid(
            f"The same by {field} ({policy}, refresh {interval})",
            [field, *(f"capacity {capacity}" for capacity in capacities)],
            [[str(value), *cells({field: value})] for value in report.values(field)],
        )
        for field in ("domain", "layer")
    ]


def charts(report: CacheReport) -> list[Chart]:
    """Hit ratio against capacity, for each refresh interval."""
    capacities = report.values("capacity")
    return [
        Chart(
            f"one search in {interval} step(s)",
            "capacity in selections",
            "hit ratio",
            [
                Line(
                    policy,
                    capacities,
                    [
                        report.ratio(policy=policy, capacity=c, interval=interval).value
                        for c in capacities
                    ],
                )
                for policy in report.values("policy")
            ],
            log_x=True,
        )
        for interval in report.values("interval")
    ]
