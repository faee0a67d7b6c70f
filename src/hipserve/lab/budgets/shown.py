"""Budgets of heads, and what they leave of the error, as a table, charts and a sentence."""

from __future__ import annotations

from pathlib import Path

from hipserve.lab.budgets.report import BudgetReport
from hipserve.lab.shown import Chart, Grid, Line, counted, with_error

FORM = ".4f"


def grids(report: BudgetReport) -> list[Grid]:
    """Layers and KV heads with their keys, and the error of each layer."""
    heads = max(len(report.keys(layer)) for layer in report.layers)
    rows: list[list[str]] = []
    for layer in report.layers:
        keys = [f"{own:,}" for own in report.keys(layer)]
        keys += [""] * (heads - len(keys))
        rows.append([str(layer), *keys, *_errors(report, layer)])
    mean = [f"{report.mean_keys:,.0f}", *[""] * (heads - 1)]
    rows.append(["mean", *mean, *_errors(report, None)])
    caption = (
        f"chosen on {counted(len(report.choose), 'document')} of {report.length:,} tokens, "
        f"error on {len(report.report)} others, {report.query_blocks} query blocks each: square of "
        "what pruning changes in the output of a layer, as a share of the square of that output"
    )
    title = f"{report.model}: keys of each KV head, {report.config.budget:,} on average"
    constant = f"error, {report.config.budget:,} each"
    headings = ["layer", *(f"head {i}" for i in range(heads)), constant, "error, these"]
    return [Grid(title, headings, rows, caption)]


def _errors(report: BudgetReport, layer: int | None) -> list[str]:
    return [with_error(report.left(layer, fitted=fitted), FORM) for fitted in (False, True)]


def charts(report: BudgetReport) -> list[Chart]:
    """Keys of every head and error of every layer."""
    layers = report.layers
    heads = [(layer, keys) for layer in layers for keys in report.keys(layer)]
    dots = Line("KV heads", [layer for layer, _ in heads], [keys for _, keys in heads], "dots")
    errors = [
        Line(name, layers, [report.left(layer, fitted=fitted).value for layer in layers])
        for name, fitted in (("constant", False), ("of each head", True))
    ]
    return [
        Chart("budgets", "layer", "keys", [dots]),
        Chart("error left", "layer", "share of the output", errors),
    ]


def advice(report: BudgetReport, out: Path | None) -> str:
    """What was gained, and what to do with it."""
    constant, fitted = report.left().value, report.left(fitted=True).value
    mean = f"the same mean of {report.mean_keys:,.0f} keys"
    if fitted >= constant:
        return f"Budgets of their own gain nothing on these texts at {mean}: leave them out."
    file = out or "hip.toml"
    first = "" if out else f"Write these lines to {file} (--out {file} does so). "
    return (
        f"{first}At {mean}, budgets of their own leave {fitted / constant:.0%} of the error. They "
        f"are for {report.model} only. Use them by `--config {file}` of run, chat, eval, calibrate "
        f'and serve, or by `model.config.hip = HiPConfig.load("{file}").to_dict()` in transformers.'
    )
