"""`hipserve eval retrieval`: what dense and pruned attention find, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.comparison import (
    Also,
    Form,
    Length,
    NoDense,
    Questions,
    Samples,
    Text,
    Vary,
    choose_length,
    make_configs,
    parse_form,
    say_what_is_dense,
)
from hipserve.cli.numbers import format_count
from hipserve.cli.output import result_json, show
from hipserve.cli.steps import Steps

if TYPE_CHECKING:
    from hipserve.lab import RetrievalReport
    from hipserve.lab.quality.retrieval import Score, TaskResult


def retrieval(
    model: options.Model = None,
    length: Length = None,
    samples: Samples = 50,
    questions: Questions = 1,
    form: Form = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks, with commas.")
    ] = "passkey,niah,kv,variables,quote",
    text: Text = None,
    also: Also = None,
    vary: Vary = None,
    no_dense: NoDense = False,
    seed: options.Seed = 0,
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
    """Accuracy of dense and pruned attention: needles, keys and values, variables, passages."""
    base = options.make_config(
        config, preset, budget, selector, code_bits, extend=extend, extend_factor=extend_factor
    )
    configs = make_configs(base, also, vary, no_dense)
    from hipserve.lab import evaluate_retrieval, read_documents
    from hipserve.lab.quality.tasks import check_task

    chosen, names = parse_form(form), [task.strip() for task in tasks.split(",")]
    for name in names:
        check_task(name)
    haystack = "\n\n".join(document.text for document in read_documents(text or ()))
    loaded = options.load_model(model, base, device, dtype)
    length = choose_length(loaded, length)
    with Steps("measuring …") as shown:
        report = evaluate_retrieval(
            loaded,
            configs,
            names,
            haystack,
            length=length,
            samples=samples,
            questions=questions,
            form=chosen,
            seed=seed,
            progress=lambda task, name, done: shown.update(f"{task}: {done}/{samples} ({name})"),
        )
    say_what_is_dense(loaded, configs, length)
    if json:
        result_json(report.to_dict())
    else:
        show(_table(report))


def _table(report: RetrievalReport) -> Table:
    size = f"{format_count(report.length)} tokens, by {report.form}"
    title = f"{report.model}, {size}, score and 95 % interval"
    table = Table("task", "samples", *report.configs, title=title)
    for row in report.results:
        cells = [
            f"{score.mean:.3f}{_interval(score)}{_change(row, name)}"
            for name, score in row.scores.items()
        ]
        table.add_row(row.task, str(row.samples), *(cell.replace("[", r"\[") for cell in cells))
    return table


def _change(row: TaskResult, name: str) -> str:
    if name not in row.difference:
        return ""
    flips = row.flips[name]
    return f" ({row.difference[name].mean:+.3f}: {flips.lost} lost, {flips.gained} gained)"


def _interval(score: Score) -> str:
    return f" [{score.interval[0]:.2f}, {score.interval[1]:.2f}]" if score.interval else ""
