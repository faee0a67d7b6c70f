"""What commands that measure quality share: configurations to compare, lengths, texts."""

from __future__ import annotations

import json as json_module
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hipserve.cli import options
from hipserve.cli.numbers import at_least, counted, format_count, parse_count
from hipserve.cli.output import say
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError

if TYPE_CHECKING:
    from hipserve.lab import FidelityReport
    from hipserve.lab.quality import controls, retrieval
    from hipserve.models import LoadedModel

LONG = 32 * 1024
Length = Annotated[
    int | None,
    typer.Option(
        parser=parse_count,
        metavar="TOKENS",
        help="Tokens; 32k or the model's shorter context if left out.",
    ),
]
First = Annotated[
    int | None,
    typer.Option(
        parser=parse_count, help="First position that counts; a quarter of the length if left out."
    ),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        parser=options.parse_path,
        metavar="FILE",
        help="Text or .jsonl file, or @licenses or @sources: texts of this installation that "
        "repeat themselves; the Python language reference if left out. Repeatable.",
    ),
]
Also = Annotated[
    list[str] | None, typer.Option(metavar="PRESET", help="Another preset to measure. Repeatable.")
]
Vary = Annotated[
    str | None,
    typer.Option(
        metavar="KEY=A,B,…", help='Other values of one field to measure: "budget=256,1k".'
    ),
]
NoDense = Annotated[
    bool,
    typer.Option("--no-dense", help="Comparison with the first configuration instead of dense."),
]
Dense = Annotated[
    str,
    typer.Option(
        metavar="KERNELS",
        help="Kernels of dense attention: sdpa, or hip, which reads every key by those that serve.",
    ),
]

Samples = Annotated[
    int, typer.Option(parser=at_least(1), metavar="N", help="Documents of each task.")
]
Questions = Annotated[
    int,
    typer.Option(
        parser=at_least(1),
        metavar="N",
        help="Questions about each document, if the task has as many.",
    ),
]
Form = Annotated[
    str | None,
    typer.Option(help="chat or continuation; chat if left out and the model has a chat template."),
]


def parse_dense(name: str) -> controls.Dense:
    """The kernels of dense attention.

    Raises:
        ArgumentError: there are none of that name.
    """
    if name not in ("sdpa", "hip"):
        raise ArgumentError("dense", "sdpa or hip", repr(name))
    return name


def parse_form(name: str | None) -> retrieval.Form | None:
    """The form of a question.

    Raises:
        ArgumentError: there is no such form.
    """
    if name not in (None, "chat", "continuation"):
        raise ArgumentError("form", "chat or continuation", repr(name))
    return name


def check_first(first: int | None, length: int | None) -> None:
    """Before anything is loaded: the first position that counts lies inside of the texts.

    Raises:
        ArgumentError: it does not, however long they are.
    """
    longest = LONG if length is None else length
    if first is not None and longest > 1 and not 0 < first < longest:
        raise ArgumentError("first", f"a position from 1 to {longest - 1}", str(first))


def choose_length(loaded: LoadedModel, length: int | None) -> int:
    """The length asked for, or the default for this model."""
    if length is not None:
        return length
    length = min(LONG, loaded.max_context)
    say(f"length: {format_count(length)} tokens")
    return length


def title_of(report: FidelityReport) -> str:
    """Model, positions and documents, for above a table."""
    span = f"{format_count(report.first)} to {format_count(report.length)}"
    return f"{report.model}, positions {span}, {counted(len(report.documents), 'document')}"


def say_what_was_left_out(report: FidelityReport) -> None:
    """Names the documents that are too short."""
    for name in report.too_short:
        say(f"left out, shorter than {report.length:,} tokens: {name}", style="yellow")


def say_what_is_dense(
    loaded: LoadedModel, configs: dict[str, HiPConfig | None], length: int
) -> None:
    """Warns of configurations that prune nothing at this length: they equal dense attention."""
    from hipserve.lab.quality.passes import may_prune, numbers_to_try, rule_of_model

    def prunes(config: HiPConfig, length: int) -> bool:
        return may_prune(loaded, config, length)

    for name, config in configs.items():
        if config and name != "dense" and not may_prune(loaded, config, length):
            below = rule_of_model(loaded, config).dense_below  # as measured: not for every budget
            hint = numbers_to_try(
                config.replace(dense_below=below), length, prunes, loaded.max_context
            )
            lower = f" or a dense_below of less than {below:,}" if below >= length else ""
            say(
                f"{name}: nothing was pruned in {length:,} tokens, it read what dense attention "
                f"reads; {hint}{lower}",
                style="yellow",
            )


def make_configs(
    base: HiPConfig, also: list[str] | None, vary: str | None, no_dense: bool
) -> dict[str, HiPConfig | None]:
    """The configurations to compare, by name; None is dense attention."""
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
