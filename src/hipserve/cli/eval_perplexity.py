"""`hipserve eval perplexity`: likelihood of real text under dense and pruned attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from hipserve.cli import options
from hipserve.cli.comparison import (
    Also,
    First,
    Length,
    NoDense,
    Text,
    Vary,
    check_first,
    choose_length,
    make_configs,
    say_what_is_dense,
    say_what_was_left_out,
    title_of,
)
from hipserve.cli.output import result_json, show
from hipserve.cli.steps import Steps

if TYPE_CHECKING:
    from hipserve.lab import PerplexityReport
    from hipserve.lab.quality.fidelity import Fidelity


def perplexity(
    model: options.Model = None,
    length: Length = None,
    first: First = None,
    text: Text = None,
    also: Also = None,
    vary: Vary = None,
    no_dense: NoDense = False,
    budget: options.Budget = None,
    selector: options.Selector = None,
    code_bits: options.CodeBits = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    extend: options.Extend = None,
    extend_factor: options.ExtendFactor = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    json: options.Json = False,
) -> None:
    """Negative log-likelihood of real text under dense and pruned attention."""
    base = options.make_config(
        config, preset, budget, selector, code_bits, extend=extend, extend_factor=extend_factor
    )
    check_first(first, length)
    configs = make_configs(base, also, vary, no_dense)
    from hipserve.lab import evaluate_perplexity, read_documents

    documents = read_documents(text or ())
    loaded = options.load_model(model, base, device, dtype)
    length = choose_length(loaded, length)
    with Steps("measuring …") as shown:
        report = evaluate_perplexity(
            loaded,
            configs,
            documents,
            length=length,
            first=first,
            progress=lambda document, name: shown.update(f"{document} ({name})"),
        )
    say_what_was_left_out(report)
    say_what_is_dense(loaded, configs, length)
    if json:
        result_json(report.to_dict())
    else:
        show(_table(report))


def _table(report: PerplexityReport) -> Table:
    domains = list(next(iter(report.results.values())).by_domain)
    fixed = ("attention", "nll", "change", "95 % interval", "KL", "same top-1", "perplexity")
    table = Table()
    for heading in (*fixed, *domains):
        table.add_column(heading)
    table.title, table.caption = title_of(report), _about_intervals(report)
    for name, nll in report.results.items():
        table.add_row(name, *_cells(nll))
    return table


def _cells(nll: Fidelity) -> list[str]:
    return [
        f"{nll.mean:.4f}",
        f"{nll.change:+.2%}",
        _change(nll),
        f"{nll.kl:.4f}",
        f"{nll.same_top:.1%}",
        f"{nll.perplexity:.3f}",
        *(f"{part:.4f}" for part in nll.by_domain.values()),
    ]


def _change(nll: Fidelity) -> str:
    return f"{nll.interval[0]:+.2%} to {nll.interval[1]:+.2%}" if nll.interval else "-"


def _about_intervals(report: PerplexityReport) -> str:
    """What the intervals rest on, or why there are none."""
    from hipserve.lab.intervals import MIN_VALUES
    from hipserve.lab.quality.fidelity import PIECE

    pieces = min(nll.pieces for nll in report.results.values())
    if any(nll.interval for nll in report.results.values()):
        return f"intervals over {report.unit}"
    return f"an interval needs {MIN_VALUES} pieces of {PIECE:,} tokens, this text has {pieces}"
