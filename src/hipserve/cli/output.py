"""Where things are printed: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

err = Console(stderr=True)


def result(text: str, end: str = "\n") -> None:
    """A result, as plain text, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def result_json(value: Any) -> None:
    result(json.dumps(value, indent=2))


def show(renderable: Any) -> None:
    """A table or another rich object, on stdout."""
    Console().print(renderable)


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
    """A line about what is going on, on stderr, as it is: no markup, no wrapping."""
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
