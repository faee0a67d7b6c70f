"""`hipserve lab quality`: pruned beside dense attention, token by token, and a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.comparison import (
    Also,
    First,
    Length,
    NoDense,
    Text,
    Vary,
    choose_length,
    make_configs,
    say_what_is_dense,
)
from hipserve.cli.numbers import format_count
from hipserve.cli.output import err, result, result_json, say, show
from hipserve.errors import ArgumentError

if TYPE_CHECKING:
    from hipserve.lab import Document, FidelityReport
    from hipserve.lab.quality.fidelity import Fidelity
    from hipserve.lab.verdicts import Verdict

Margin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MEASURE=SIZE",
        help="Difference that counts as none: likelihood=0.5%, kl=0.05 (nats) or top1=5%. "
        "Repeatable.",
    ),
]
Documents = Annotated[
    str | None,
    typer.Option(
        metavar="START:STOP:STEP",
        help="Which of the texts, as a slice: ::2 to choose by, 1::2 to confirm by.",
    ),
]


def quality(
    model: options.Model = None,
    length: Length = None,
    first: First = None,
    text: Text = None,
    documents: Documents = None,
    margin: Margin = None,
    also: Also = None,
    vary: Vary = None,
    no_dense: NoDense = False,
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    json: options.Json = False,
) -> None:
    """Likelihood, KL and likeliest tokens of real text beside dense attention, with verdicts.

    The first row below dense attention is its noise floor, the last one has to be caught.
    """
    base = options.make_config(config, preset, budget, selector)
    configs = make_configs(base, also, vary, no_dense)
    margins = _margins(margin)
    from hipserve.lab import evaluate_fidelity, read_documents

    chosen = _choose(read_documents(text or ()), documents)
    loaded = options.load_model(model, base, device, dtype)
    length = choose_length(loaded, length)
    with err.status("measuring …") as status:
        report = evaluate_fidelity(
            loaded,
            configs,
            chosen,
            length=length,
            first=first,
            margins=margins,
            progress=lambda document, name: status.update(f"{document} ({name})"),
        )
    for name in report.too_short:
        say(f"left out, shorter than {length:,} tokens: {name}", style="yellow")
    say_what_is_dense(loaded, configs, length)
    for warning in report.warnings:
        say(warning, style="yellow")
    if json:
        result_json(report.to_dict())
        return
    show(_table(report))
    for name, row in report.results.items():
        if row.verdicts:
            result(f"{name}: {_sentence(row, report.unit)}")


def _margins(given: list[str] | None) -> dict[str, float]:
    """Those that are given, on top of the defaults."""
    from hipserve.lab.quality.fidelity import MARGINS, check_margins

    parsed = dict(map(_margin, given or ()))
    check_margins(parsed)
    return {**MARGINS, **parsed}


def _margin(text: str) -> tuple[str, float]:
    """`likelihood=0.5%` or `kl=0.01`."""
    name, _, size = (part.strip() for part in text.partition("="))
    try:
        value = float(size.removesuffix("%"))
    except ValueError:
        hint = 'write "likelihood=0.5%"'
        raise ArgumentError("margin", "MEASURE=SIZE", repr(text), hint) from None
    return name, value / 100 if size.endswith("%") else value


def _choose(documents: list[Document], which: str | None) -> list[Document]:
    if which is None:
        return documents
    try:
        numbers = [int(part) if part.strip() else None for part in which.split(":")]
        chosen = documents[slice(*numbers)] if 1 < len(numbers) < 4 else []
    except ValueError:
        chosen = []
    if not chosen:
        expected = f"a slice that leaves some of the {len(documents)} texts"
        raise ArgumentError("documents", expected, repr(which), "write ::2 or 1::2")
    return chosen


def _table(report: FidelityReport) -> Table:
    span = f"{format_count(report.first)} to {format_count(report.length)}"
    title = f"{report.model}, positions {span}, {len(report.documents)} documents"
    table = Table(title=title)
    for heading in ("attention", "nll", "change", "KL", "KL p99", "same top-1", "verdict"):
        table.add_column(heading)
    table.caption = f"95 % intervals over {report.unit}"
    for name, row in report.results.items():
        table.add_row(name, *_cells(row))
    return table


def _cells(row: Fidelity) -> list[str]:
    return [
        f"{row.mean:.4f}",
        _with_error(row.change, row.interval, "+.2%", ".2%"),
        _with_error(row.kl, row.kl_interval, ".4f", ".4f"),
        f"{row.kl_p99:.3f}",
        _with_error(row.same_top, row.same_top_interval, ".1%", ".1%"),
        row.decision or "",
    ]


def _with_error(value: float, interval: tuple[float, float] | None, form: str, half: str) -> str:
    if interval is None:
        return f"{value:{form}}"
    return f"{value:{form}}\n±{(interval[1] - interval[0]) / 2:{half}}"


def _sentence(row: Fidelity, unit: str) -> str:
    return ", ".join(f"{name} {_words(verdict, unit)}" for name, verdict in row.verdicts.items())


def _words(verdict: Verdict, unit: str) -> str:
    within = f"{verdict.decision} (margin {verdict.margin:g}"
    if verdict.decision != "undecided":
        return f"{within})"
    if verdict.more is None:
        return f"{within}: too near to it)"
    return f"{within}: {verdict.more:,} {unit} more)"
