"""`hipserve lab depth`: one task at several depths of texts of several lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.comparison import (
    Also,
    Form,
    NoDense,
    Text,
    Vary,
    make_configs,
    parse_form,
    say_what_is_dense,
)
from hipserve.cli.numbers import at_least, counted, format_count, parse_counts
from hipserve.cli.output import result, result_json, say, show
from hipserve.cli.steps import Steps

if TYPE_CHECKING:
    from hipserve.lab import DepthReport
    from hipserve.lab.quality.depth import Overall
    from hipserve.lab.quality.retrieval import TaskResult

Depths = Annotated[
    int,
    typer.Option(parser=at_least(1), metavar="N", help="Depths from the beginning to the end."),
]
Samples = Annotated[
    int, typer.Option(parser=at_least(1), metavar="N", help="Documents of each length and depth.")
]


def depth(
    model: options.Model = None,
    task: Annotated[str, typer.Option(help="passkey, niah, kv, multikey or quote.")] = "niah",
    lengths: Annotated[
        str, typer.Option(metavar="A,B,…", help="Lengths in tokens.")
    ] = "8k,16k,32k",
    depths: Depths = 5,
    samples: Samples = 10,
    form: Form = None,
    text: Text = None,
    also: Also = None,
    vary: Vary = None,
    no_dense: NoDense = False,
    seed: options.Seed = 0,
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    extend: options.Extend = None,
    extend_factor: options.ExtendFactor = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    json: options.Json = False,
) -> None:
    """Answers by depth and length, pruned and dense: needles, or a quote at a distance.

    The last configuration is blind to the middle of a text and has to be caught.
    """
    base = options.make_config(
        config, preset, budget, selector, extend=extend, extend_factor=extend_factor
    )
    configs = make_configs(base, also, vary, no_dense)
    from hipserve.lab import evaluate_depths, read_documents
    from hipserve.lab.quality.tasks import check_depth

    check_depth(task, 0.0)
    chosen, counts = parse_form(form), parse_counts(lengths)
    haystack = "\n\n".join(document.text for document in read_documents(text or ()))
    loaded = options.load_model(model, base, device, dtype)
    with Steps("measuring …") as shown:
        report = evaluate_depths(
            loaded,
            configs,
            task,
            haystack,
            lengths=counts,
            depths=[i / max(depths - 1, 1) for i in range(depths)],
            samples=samples,
            form=chosen,
            seed=seed,
            progress=lambda task, name, done: shown.update(f"{task}: {done}/{samples} ({name})"),
        )
    say_what_is_dense(loaded, configs, min(counts))
    for warning in report.warnings:
        say(warning, style="yellow")
    if json:
        result_json(report.to_dict())
        return
    show(_table(report))
    for name, row in report.overall.items():
        result(f"{report.task}, {name}: {_sentence(row)}")


def _table(report: DepthReport) -> Table:
    depths = list(dict.fromkeys(cell.depth for cell in report.cells))
    cells = {(cell.length, cell.depth): cell.result for cell in report.cells}
    table = Table("tokens", "attention", *(f"{depth:.0%}" for depth in depths))
    table.title = f"{report.model}, {report.task} by {report.form}: score by depth"
    table.caption = "in brackets: change of the right answer's log-probability, in nats"
    for length in dict.fromkeys(cell.length for cell in report.cells):
        for name in report.configs:
            row = [_cell(cells[length, depth], name) for depth in depths]
            table.add_row(format_count(length), name, *row)
    return table


def _cell(row: TaskResult, name: str) -> str:
    score = f"{row.scores[name].mean:.2f}"
    return f"{score} ({row.flips[name].nats:+.2f})" if name in row.flips else score


def _sentence(row: Overall) -> str:
    interval = f" [{row.interval[0]:+.1%}, {row.interval[1]:+.1%}]" if row.interval else ""
    more = f", {counted(row.verdict.more, 'question')} more" if row.verdict.more else ""
    return f"{row.change:+.1%}{interval}: {row.verdict.decision}{more}"
