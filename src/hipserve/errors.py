"""The exception tree. An error names the argument, what was expected and what was given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HipserveError(Exception):
    """Base of every error that hipserve raises on purpose.

    Attributes:
        message: what is wrong.
        hint: what to do about it; empty where the message is enough.
    """

    def __init__(self, message: str = "", hint: str = "") -> None:
        self.message, self.hint = message, hint
        super().__init__(f"{message}; {hint}" if hint else message)


class ArgumentError(HipserveError, ValueError):
    """A value that cannot be used.

    Attributes:
        argument: name of the argument, as the caller wrote it.
        expected: what would have been accepted.
        got: what was given.
        hint: what to do about it; empty where `expected` is enough.
    """

    def __init__(self, argument: str, expected: str, got: str, hint: str = "") -> None:
        self.argument, self.expected, self.got = argument, expected, got
        super().__init__(f"{argument}: expected {expected}, got {got}", hint)


class ConfigError(ArgumentError):
    """A `HiPConfig` field, key or file that cannot be used."""


class BackendError(HipserveError, RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


class FitError(HipserveError):
    """The document, the request or the cache exceeds a limit; the message has the numbers."""


class NumericsError(HipserveError):
    """A result that is about to be timed is wrong; the message says which and by how much."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word, such as "did you mean budget?"; empty if no word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""
