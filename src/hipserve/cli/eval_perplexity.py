"""`hipserve eval perplexity`: likelihood of real text under dense and pruned attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.comparison import (
    Also,
    Length,
    NoDense,
    Text,
    Vary,
    choose_length,
    make_configs,
    say_what_is_dense,
)
from hipserve.cli.numbers import format_count, parse_count
from hipserve.cli.output import err, result_json, say, show

if TYPE_CHECKING:
    from hipserve.lab import PerplexityReport
    from hipserve.lab.quality.perplexity import Nll


def perplexity(
    model: options.Model = None,
    length: Length = None,
    first: Annotated[
        int | None,
        typer.Option(
            parser=parse_count,
            help="First position that counts; a quarter of the length if left out.",
        ),
    ] = None,
    text: Text = None,
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
    """Negative log-likelihood of real text under dense and pruned attention."""
    base = options.make_config(config, preset, budget, selector)
    configs = make_configs(base, also, vary, no_dense)
    from hipserve.lab import evaluate_perplexity, read_documents

    documents = read_documents(text or ())
    loaded = options.load_model(model, base, device, dtype)
    length = choose_length(loaded, length)
    with err.status("measuring …") as status:
        report = evaluate_perplexity(
            loaded,
            configs,
            documents,
            length=length,
            first=first,
            progress=lambda document, name: status.update(f"{document} ({name})"),
        )
    for name in report.too_short:
        say(f"left out, shorter than {length:,} tokens: {name}", style="yellow")
    say_what_is_dense(loaded, configs, length)
    if json:
        result_json(report.to_dict())
    else:
        show(_table(report))


def _table(report: PerplexityReport) -> Table:
    span = f"{format_count(report.first)} to {format_count(report.length)}"
    title = f"{report.model}, positions {span}, {len(report.documents)} documents"
    domains = list(next(iter(report.results.values())).by_domain)
    table = Table("attention", "nll", "change", "95 % interval", "perplexity", *domains)
    table.title = title
    for name, nll in report.results.items():
        table.add_row(
            name,
            f"{nll.mean:.4f}",
            f"{nll.change:+.2%}",
            _change(nll),
            f"{nll.perplexity:.3f}",
            *(f"{nll.by_domain[domain]:.4f}" for domain in domains),
        )
    return table


def _change(nll: Nll) -> str:
    from hipserve.lab.intervals import MIN_VALUES
    from hipserve.lab.quality.perplexity import PIECE

    if nll.interval is None:
        return f"needs {MIN_VALUES} pieces of {PIECE:,} tokens, has {nll.pieces}"
    return f"{nll.interval[0]:+.2%} to {nll.interval[1]:+.2%}"
