"""Splits, correlation and recall as tables and charts."""

from __future__ import annotations

from hipserve.lab.intervals import mean
from hipserve.lab.representative.recall import SEARCHES
from hipserve.lab.representative.report import RepresentativeReport
from hipserve.lab.representative.splits import LAGS, REPRESENTATIVES
from hipserve.lab.shown import Chart, Grid, Line, counted, with_error


def grids(report: RepresentativeReport) -> list[Grid]:
    """Splits, recall, and both for every head."""
    return [_splits(report), _recall(report), _heads(report)]


def _splits(report: RepresentativeReport) -> Grid:
    rows = [
        [
            str(size),
            kind,
            *(
                with_error(report.share(size, name, predicted=predicted))
                for name in REPRESENTATIVES
            ),
        ]
        for size in report.sizes
        for kind, predicted in (("measured", False), ("predicted", True))
    ]
    caption = (
        f"{counted(len(report.samples), 'text')} of {report.length:,} tokens, "
        f"{counted(report.rows, 'row')} each; "
        "predicted: Gaussian scores with the measured correlation of each head, and nothing else"
    )
    title = f"{report.model}: splits of a range that a representative gets right"
    return Grid(title, ["keys", "", *REPRESENTATIVES], rows, caption)


def _recall(report: RepresentativeReport) -> Grid:
    rows: list[list[str]] = []
    for search in SEARCHES:
        heads = [mean([p.recall[search] for p in points]) for _, points in report.heads()]
        ends = [f"{min(heads):.3f}", f"{max(heads):.3f}"]
        name = search if search == "bound" else f"tree, {search}"
        rows.append([name, with_error(report.recall(search)), *ends])
    caption = f"budget {report.config['budget']}, decode rows; the best have the highest scores"
    headings = ["search", "all heads", "worst head", "best head"]
    return Grid("Share of the best blocks that a search chooses", headings, rows, caption)


def _heads(report: RepresentativeReport) -> Grid:
    size = report.sizes[0]
    rows: list[list[str]] = []
    for (layer, head), points in report.heads():
        values = [
            *(mean([p.correlation[lag] for p in points]) for lag in (4, 64)),
            mean([p.measured[size]["middle"] for p in points]),
            mean([p.predicted[size]["middle"] for p in points]),
            mean([p.measured[size]["mean"] for p in points]),
            mean([p.recall["middle"] for p in points]),
            mean([p.recall["bound"] for p in points]),
        ]
        rows.append([f"{layer}.{head}", *(f"{value:.3f}" for value in values)])
    headings = ["head", "rho(4)", "rho(64)", "middle", "predicted", "mean", "tree", "bound"]
    caption = f"splits of {size} keys; recall of the tree with middles and of the bound selector"
    return Grid("Every layer and KV head", headings, rows, caption)


def charts(report: RepresentativeReport) -> list[Chart]:
    """Correlation by distance and domain; splits measured against predicted."""
    domains = dict.fromkeys(report.samples.values())
    lines = [
        Line(
            domain,
            LAGS,
            [
                mean([p.correlation[lag] for p in report.points if p.domain == domain])
                for lag in LAGS
            ],
        )
        for domain in domains
    ]
    size = report.sizes[0]
    dots = [
        Line(
            name,
            [p.predicted[size][name] for p in report.points],
            [p.measured[size][name] for p in report.points],
            "dots",
        )
        for name in REPRESENTATIVES
    ]
    return [
        Chart("correlation of scores", "distance in keys", "correlation", lines, log_x=True),
        Chart(f"splits of {size} keys", "predicted share", "measured share", dots),
    ]
