"""How commands are registered: `-h` everywhere, and a repeated option is refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from hipserve.cli.options import CHECKS
from hipserve.errors import ArgumentError

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"]}

ALIASES = {"file": ("doc", "text", "prompts"), "task": ("tasks", "task")}
"""Arguments of the library, and the options that they come from where names differ."""


class Commands(typer.Typer):
    """A group of commands that refuse repeated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(context_settings=CONTEXT, no_args_is_help=True, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        return super().command(name, cls=Command, **options)


class Command(TyperCommand):
    """A command whose single-valued options may be given once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        params = [p for p in self.get_params(ctx) if p.param_type_name == "option"]
        for param, words in _given(params, args).items():
            switch = getattr(param, "is_flag", False) and len(set(words)) == 1
            if len(words) > 1 and not switch and not getattr(param, "multiple", False):
                names = " and ".join(dict.fromkeys(words))
                ctx.fail(f"{names} given {len(words)} times: it takes one value; keep one of them")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Checks what needs no model, then runs it; errors name options as they were typed."""
        try:
            for argument in [name for name in CHECKS if name in ctx.params]:
                CHECKS[argument](ctx.params[argument])
            return super().invoke(ctx)
        except ArgumentError as error:
            name = _typed(ctx, error.argument)
            if name is None:
                raise
            raise type(error)(name, error.expected, error.got, error.hint) from error


def _typed(ctx: Any, argument: str) -> str | None:
    """The option that was typed for an argument of the library, if one was."""
    names = ALIASES.get(argument, (argument,))
    typed = [
        max(param.opts, key=len)
        for param in ctx.command.get_params(ctx)
        if param.name in names
        and param.param_type_name == "option"
        and getattr(ctx.get_parameter_source(param.name), "name", "") == "COMMANDLINE"
    ]
    return typed[0] if len(typed) == 1 else None


def _given(params: Sequence[Any], args: list[str]) -> dict[Any, list[str]]:
    """The words by which each option was named, in order."""
    by_name = {word: p for p in params for word in (*p.opts, *p.secondary_opts)}
    given: dict[Any, list[str]] = defaultdict(list)
    for word in _options(by_name, iter(args)):
        given[by_name[word]].append(word)
    return given


def _options(by_name: dict[str, Any], words: Iterator[str]) -> Iterator[str]:
    """The words that name a known option, without what follows them as a value."""
    for word in words:
        if word == "--":
            return
        name, equals, _ = word.partition("=")
        if name in by_name:
            yield name
            if not equals and not getattr(by_name[name], "is_flag", False):
                next(words, None)
