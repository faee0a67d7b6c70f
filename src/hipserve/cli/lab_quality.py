"""`hipserve lab quality`: pruned beside dense attention, token by token, and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipserve.cli import comparison, options
from hipserve.cli.comparison import (
    Also,
    First,
    Form,
    Length,
    NoDense,
    Questions,
    Samples,
    Text,
    Vary,
    check_first,
    choose_length,
    make_configs,
    parse_form,
    say_what_is_dense,
    say_what_was_left_out,
)
from hipserve.cli.lab_shared import Svg, check_svg, show_grids, write_svg
from hipserve.cli.numbers import counted
from hipserve.cli.output import result, result_json, say
from hipserve.cli.steps import Steps
from hipserve.errors import ArgumentError

if TYPE_CHECKING:
    from hipserve.lab import Document, FidelityReport, RetrievalReport

Margin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MEASURE=SIZE",
        help="Difference that counts as none: likelihood=0.5%, kl=0.05 (nats), top1=5%, far=0.05 "
        "(nats) or answers=2%. "
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
    tasks: Annotated[str, typer.Option(help="Tasks of eval retrieval as well, with commas.")] = "",
    samples: Samples = 50,
    questions: Questions = 8,
    form: Form = None,
    seed: options.Seed = 0,
    margin: Margin = None,
    also: Also = None,
    vary: Vary = None,
    no_dense: NoDense = False,
    dense: comparison.Dense = "sdpa",
    budget: options.Budget = None,
    selector: options.Selector = None,
    code_bits: options.CodeBits = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    extend: options.Extend = None,
    extend_factor: options.ExtendFactor = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    svg: Svg = None,
    json: options.Json = False,
) -> None:
    """Likelihood, KL, likeliest tokens and answers compared with dense attention, with verdicts.

    The first row below dense attention is its noise floor, the last one has to be caught.
    """
    base = options.make_config(
        config, preset, budget, selector, code_bits, extend=extend, extend_factor=extend_factor
    )
    check_first(first, length)
    check_svg(svg)
    configs = make_configs(base, also, vary, no_dense)
    kernels = comparison.parse_dense(dense)
    margins = _margins(margin)
    names = [task.strip() for task in tasks.split(",") if task.strip()]
    chosen_form = parse_form(form)
    from hipserve.lab import evaluate_fidelity, evaluate_retrieval, read_documents
    from hipserve.lab.quality.controls import everything
    from hipserve.lab.quality.tasks import check_task

    for task in names:
        check_task(task)
    chosen = _choose(read_documents(text or ()), documents)
    if kernels == "hip" and not no_dense:
        configs["dense"] = everything(base)
    loaded = options.load_model(model, base, device, dtype)
    length = choose_length(loaded, length)
    with Steps("measuring …") as shown:
        report = evaluate_fidelity(
            loaded,
            configs,
            chosen,
            length=length,
            first=first,
            margins=margins,
            progress=lambda document, name: shown.update(f"{document} ({name})"),
        )
        answers = evaluate_retrieval(
            loaded,
            configs,
            names,
            "\n\n".join(document.text for document in chosen),
            length=length,
            samples=samples,
            questions=questions,
            form=chosen_form,
            seed=seed,
            margin=margins["answers"],
            controls=True,
            progress=lambda task, name, done: shown.update(f"{task}: {done}/{samples} ({name})"),
        )
    say_what_is_dense(loaded, configs, length)
    _show(report, answers if names else None, svg, json)


def _show(
    report: FidelityReport, answers: RetrievalReport | None, svg: Path | None, json: bool
) -> None:
    from hipserve.lab.quality.shown import charts

    say_what_was_left_out(report)
    for warning in (*report.warnings, *(answers.warnings if answers else ())):
        say(warning, style="yellow")
    write_svg(svg, charts(report))
    if json:
        result_json({**report.to_dict(), "tasks": answers.to_dict() if answers else None})
        return
    _show_text(report)
    if answers:
        _show_tasks(answers)


def _show_text(report: FidelityReport) -> None:
    from hipserve.lab.quality.shown import costs_grid, grid, sentences

    show_grids([grid(report), *([costs_grid(report)] if len(report.judged()) > 1 else [])])
    for sentence in sentences(report):
        result(sentence)


def _show_tasks(report: RetrievalReport) -> None:
    from hipserve.lab.quality.shown import answers_grid, answers_sentences

    show_grids([answers_grid(report)])
    for sentence in answers_sentences(report):
        result(sentence)


def _margins(given: list[str] | None) -> dict[str, float]:
    """Those that are given, on top of the defaults."""
    from hipserve.lab.verdicts import MARGINS, check_margins

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
        expected = f"a slice that leaves some of {counted(len(documents), 'text')}"
        raise ArgumentError("documents", expected, repr(which), "write ::2 or 1::2")
    return chosen
