"""Where things are printed: results on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hipserve.errors import HipserveError

err = Console(stderr=True)

WIDEST = 400
"""Characters of a line of what is no terminal."""
READABLE = 100
"""As many where a table holds sentences: as wide as a page of a log."""


def tolerate_any_text() -> None:
    """Characters that stdout cannot encode are written as escapes, as on stderr; bytes of stdin
    that cannot be decoded are kept, as in arguments."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def result(text: str, end: str = "\n") -> None:
    """A result, as plain text, at once."""
    stream = _stdout()
    stream.write(text + end)
    stream.flush()


def result_json(value: Any) -> None:
    result(json.dumps(value, indent=2))


def show(renderable: Any, width: int = WIDEST) -> None:
    """A table or another rich object, on stdout: folded where a terminal is narrow, and up to
    `width` in a file or a pipe."""
    stream = _stdout()
    if isinstance(renderable, Table):
        for column in renderable.columns:
            column.overflow = "fold"
    narrow = stream.isatty() or "COLUMNS" in os.environ
    Console(file=stream, width=None if narrow else width).print(renderable)


def _stdout() -> TextIO:
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]  # `>&-` in a shell
        raise HipserveError("stdout is closed: the result cannot be written")
    return sys.stdout


def progress_bar() -> Progress:
    """Tokens read of tokens to read, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,} tokens"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        redirect_stdout=False,
        disable=not err.is_terminal,
    )


def say(text: str, style: str = "dim") -> None:
    """A line of progress on stderr, without markup or wrapping."""
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
