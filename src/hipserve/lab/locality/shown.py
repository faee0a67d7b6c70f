"""Locality as tables and charts."""

from __future__ import annotations

from hipserve.lab.intervals import mean
from hipserve.lab.locality.report import (
    PREDICTORS,
    LocalityPoint,
    LocalityReport,
    Measure,
)
from hipserve.lab.representative.splits import LAGS, SIZES
from hipserve.lab.shown import Chart, Grid, Line, counted, with_error

SHOWN_LAGS = (1, 16, 64)


def grids(report: LocalityReport) -> list[Grid]:
    """By domain, what predicts a loss, and every head."""
    predictions = [_predictions(report)] if report.predictions else []
    return [_domains(report), *predictions, _heads(report)]


def _domains(report: LocalityReport) -> Grid:
    def cell(domain: str, form: str, measure: Measure) -> str:
        return with_error(report.of_domain(domain, measure), form)

    rows = [
        [
            domain,
            *(cell(domain, ".3f", lambda p, size=size: p.intraclass[size]) for size in SIZES),
            *(cell(domain, ".2f", lambda p, size=size: p.waste[size]) for size in SIZES),
            *(cell(domain, ".3f", lambda p, lag=lag: p.correlation[lag]) for lag in SHOWN_LAGS),
            cell(domain, ".3f", lambda p: p.unread),
        ]
        for domain in dict.fromkeys(report.samples.values())
    ]
    headings = [
        "domain",
        *(f"intraclass {size}" for size in SIZES),
        *(f"waste {size}" for size in SIZES),
        *(f"rho({lag})" for lag in SHOWN_LAGS),
        "unread",
    ]
    caption = (
        f"{counted(len(report.samples), 'text')} of {report.length:,} tokens, "
        f"{counted(report.rows, 'row')} each, mean "
        "over layers and KV heads; unread: attention outside the best blocks of a budget of "
        f"{report.config['budget']}"
    )
    return Grid(f"{report.model}: locality by domain", headings, rows, caption)


def _predictions(report: LocalityReport) -> Grid:
    rows = [
        [name, f"{found.value:+.2f}", f"{low:+.2f} to {high:+.2f}"]
        for name, found in report.predictions.items()
        for low, high in [found.interval or (-1.0, 1.0)]
    ]
    heads = next(iter(report.predictions.values())).pairs
    texts = {point.sample for point in report.points if point.loss is not None}
    count = counted(len(texts), "text")
    caption = f"{heads} KV heads, each pruned alone on {count}; KL over their last half"
    headings = ["measure", "rank correlation", "95 % interval"]
    return Grid("Does it predict the loss of pruning a head?", headings, rows, caption)


def _heads(report: LocalityReport) -> Grid:
    rows = [
        [
            f"{layer}.{head}",
            f"{mean([p.intraclass[16] for p in points]):.3f}",
            f"{mean([p.waste[16] for p in points]):.2f}",
            f"{mean([p.correlation[16] for p in points]):.3f}",
            f"{mean([p.unread for p in points]):.3f}",
            _loss(points),
        ]
        for (layer, head), points in report.heads()
    ]
    headings = ["head", "intraclass 16", "waste 16", "rho(16)", "unread", "loss in nats"]
    return Grid("Every layer and KV head", headings, rows)


def _loss(points: list[LocalityPoint]) -> str:
    found = [point.loss for point in points if point.loss is not None]
    return f"{mean(found):.5f}" if found else ""


def charts(report: LocalityReport) -> list[Chart]:
    """Correlation by distance and domain; loss against two measures."""
    by_domain = {
        domain: [point.correlation for point in report.points if point.domain == domain]
        for domain in report.samples.values()
    }
    lines = [
        Line(domain, LAGS, [mean([rho[lag] for rho in found]) for lag in LAGS])
        for domain, found in by_domain.items()
    ]
    drawn = [Chart("correlation of scores", "distance in keys", "correlation", lines, log_x=True)]
    measured = [point for point in report.points if point.loss is not None]
    for name in ("intraclass, 16 keys", "unread attention") if measured else ():
        x = [PREDICTORS[name](point) for point in measured]
        dots = Line("heads", x, [point.loss or 0.0 for point in measured], "dots")
        drawn.append(Chart("pruning a head alone", name, "KL in nats", [dots], log_y=True))
    return drawn
