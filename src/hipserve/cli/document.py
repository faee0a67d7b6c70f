"""Texts that users give: documents, stdin, words of the command line."""

from __future__ import annotations

import itertools
import os
import sys
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, TextIO

from hipserve.errors import ArgumentError, FitError

if TYPE_CHECKING:
    from hipserve.models import LoadedModel


class OpenDocument:
    """A file, or stdin for `-`, opened and begun before a model is loaded.

    Raises:
        ArgumentError: it cannot be read, has no text, or does not begin as UTF-8.
    """

    def __init__(self, path: str) -> None:
        from hipserve.lab.text import PART, decode_text, open_text, read_parts

        self.source = "stdin" if path == "-" else path
        with ExitStack() as stack:
            file = standard_input().buffer if path == "-" else stack.enter_context(open_text(path))
            self._parts = stack.enter_context(closing(read_parts(file, self.source)))
            self._head = next(self._parts, b"")
            whole = len(self._head) < PART
            if whole or self._head.strip():
                decode_text(self._head, self.source, cut=not whole)
            self._open = stack.pop_all()

    def read(self, count: int) -> bytes:
        """The first `count` bytes; asked for once, as it closes the file."""
        from hipserve.lab.text import first_bytes

        with self._open:
            return first_bytes(itertools.chain([self._head], self._parts), count)

    def read_for(self, loaded: LoadedModel) -> str:
        """The text, unless it is longer than the model can read."""
        from hipserve.lab.text import decode_text

        limit = loaded.max_bytes
        content = self.read(limit + 1)
        if len(content) > limit:
            raise FitError(
                f"{self.source} does not fit {loaded.name}: it has more than {limit:,} bytes, and "
                f"no text as long has room in its context of {loaded.max_context:,} tokens",
                "shorten the document or choose another model",
            )
        return decode_text(content, self.source)


def as_text(argument: str, words: str) -> str:
    """What was typed, as text: Python keeps bytes that its locale cannot read as surrogates.

    Raises:
        ArgumentError: the bytes are not UTF-8.
    """
    try:
        words.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(words).decode()
        except UnicodeError:
            raise ArgumentError(argument, "UTF-8 text", ascii(words)) from None
    return words


def standard_input() -> TextIO:
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]  # `<&-` in a shell
        raise ArgumentError("stdin", "something to read", "a closed one")
    return sys.stdin
