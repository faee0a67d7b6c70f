"""`hipserve eval`: quality beside dense attention, with intervals."""

from __future__ import annotations

import json as json_module
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.commands import Commands
from hipserve.cli.numbers import at_least, format_count, parse_count
from hipserve.cli.output import err, result_json, say, show
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError

if TYPE_CHECKING:
    from hipserve.evaluate import PerplexityReport, RetrievalReport
    from hipserve.evaluate.perplexity import Nll
    from hipserve.evaluate.retrieval import Form, Score
    from hipserve.models import LoadedModel

app = Commands(help="Quality of pruned attention compared with dense attention.")

LONG = 32 * 1024
Length = Annotated[
    int | None,
    typer.Option(
        parser=parse_count, metavar="TOKENS", help="32k, or the model's context if that is shorter."
    ),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        parser=options.parse_path,
        metavar="FILE",
        help="Text or .jsonl files; the Python language reference if left out. Repeatable.",
    ),
]
Also = Annotated[
    list[str] | None, typer.Option(metavar="PRESET", help="Also measure a preset. Repeatable.")
]
Vary = Annotated[
    str | None,
    typer.Option(metavar="KEY=A,B,…", help='Also measure values of one field: "budget=256,1k".'),
]
NoDense = Annotated[
    bool, typer.Option("--no-dense", help="Compare to the first configuration, not to dense.")
]


@app.command()
def retrieval(
    model: options.Model = None,
    length: Length = None,
    samples: Annotated[
        int, typer.Option(parser=at_least(1), metavar="N", help="Documents of each task.")
    ] = 50,
    questions: Annotated[
        int,
        typer.Option(
            parser=at_least(1),
            metavar="N",
            help="About each document, where the task has so many.",
        ),
    ] = 1,
    form: Annotated[
        str | None,
        typer.Option(
            help="chat or continuation; chat if left out and the model has a chat template."
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="With commas.")] = "passkey,niah,kv,variables,quote",
    text: Text = None,
    also: Also = None,
    vary: Vary = None,
    no_dense: NoDense = False,
    seed: options.Seed = 0,
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    json: options.Json = False,
) -> None:
    """Needles, keys and values, variables, passages: found by dense and by pruned attention?"""
    base = options.make_config(config, preset, budget, selector)
    configs = _configs(base, also, vary, no_dense)
    from hipserve.evaluate import evaluate_retrieval, read_documents

    chosen = _form(form)
    haystack = "\n\n".join(document.text for document in read_documents(text or ()))
    loaded = options.load_model(model, base, device, dtype)
    length = _length(loaded, length)
    with err.status("measuring …") as status:
        report = evaluate_retrieval(
            loaded,
            configs,
            [task.strip() for task in tasks.split(",")],
            haystack,
            length=length,
            samples=samples,
            questions=questions,
            form=chosen,
            seed=seed,
            progress=lambda task, name, done: status.update(f"{task}: {done}/{samples} ({name})"),
        )
    _say_what_is_dense(loaded, configs, length)
    if json:
        result_json(report.to_dict())
    else:
        show(_retrieval_table(report))


@app.command()
def perplexity(
    model: options.Model = None,
    length: Length = None,
    first: Annotated[
        int | None,
        typer.Option(parser=parse_count, help="First position that counts; a quarter of length."),
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
    configs = _configs(base, also, vary, no_dense)
    from hipserve.evaluate import evaluate_perplexity, read_documents

    documents = read_documents(text or ())
    loaded = options.load_model(model, base, device, dtype)
    length = _length(loaded, length)
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
    _say_what_is_dense(loaded, configs, length)
    if json:
        result_json(report.to_dict())
    else:
        show(_perplexity_table(report))


def _form(name: str | None) -> Form | None:
    if name not in (None, "chat", "continuation"):
        raise ArgumentError("form", "chat or continuation", repr(name))
    return name


def _length(loaded: LoadedModel, length: int | None) -> int:
    """The length asked for, or the default for this model."""
    if length is not None:
        return length
    length = min(LONG, loaded.max_context)
    say(f"length: {format_count(length)} tokens")
    return length


def _say_what_is_dense(
    loaded: LoadedModel, configs: dict[str, HiPConfig | None], length: int
) -> None:
    """Two columns of the same attention show no difference, and that means nothing."""
    from hipserve.evaluate.passes import may_prune

    for name, config in configs.items():
        if config is not None and not may_prune(loaded, config, length):
            say(
                f"{name}: nothing was pruned in {length:,} tokens, it read what dense attention "
                "reads; give a longer --length, a smaller --budget or a lower dense_below",
                style="yellow",
            )


def _configs(
    base: HiPConfig, also: list[str] | None, vary: str | None, no_dense: bool
) -> dict[str, HiPConfig | None]:
    configs: dict[str, HiPConfig | None] = {} if no_dense else {"dense": None}
    configs["hip"] = base
    for name in also or ():
        configs[name] = HiPConfig.preset(name)
    if vary:
        key, equals, values = (part.strip() for part in vary.partition("="))
        if not (key and equals):
            raise ArgumentError("vary", "KEY=A,B,…", repr(vary), 'write "budget=256,1k"')
        for value in re.split(r",(?![^\[]*\])", values):  # not inside a list
            configs[f"{key}={value}"] = base.replace(**{key: _value(value)})
    return configs


def _value(text: str) -> Any:
    """A field's value as written on the command line: a count, JSON, or a word."""
    try:
        return parse_count(text)
    except typer.BadParameter:
        pass
    try:
        return json_module.loads(text)
    except json_module.JSONDecodeError:
        return text


def _retrieval_table(report: RetrievalReport) -> Table:
    size = f"{format_count(report.length)} tokens, by {report.form}"
    title = f"{report.model}, {size}, score and 95 % interval"
    table = Table("task", "samples", *report.configs, title=title)
    for row in report.results:
        cells = [
            f"{score.mean:.3f}{_interval(score)}"
            + (f" ({row.difference[name].mean:+.3f})" if name in row.difference else "")
            for name, score in row.scores.items()
        ]
        table.add_row(row.task, str(row.samples), *(cell.replace("[", r"\[") for cell in cells))
    return table


def _interval(score: Score) -> str:
    return f" [{score.interval[0]:.2f}, {score.interval[1]:.2f}]" if score.interval else ""


def _perplexity_table(report: PerplexityReport) -> Table:
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
    from hipserve.evaluate.intervals import MIN_VALUES
    from hipserve.evaluate.perplexity import PIECE

    if nll.interval is None:
        return f"needs {MIN_VALUES} pieces of {PIECE:,} tokens, has {nll.pieces}"
    return f"{nll.interval[0]:+.2%} to {nll.interval[1]:+.2%}"
