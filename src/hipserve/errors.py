"""The exception tree: errors name the argument, what was expected, what came and what to do."""

from __future__ import annotations


class HipserveError(Exception):
    """Base of every error that hipserve raises on purpose."""


class ArgumentError(HipserveError, ValueError):
    """A value that cannot be used.

    Attributes:
        argument: name of the argument, as the caller wrote it.
        expected: what would have been accepted.
        got: what came.
        hint: what to do about it.
    """

    def __init__(self, argument: str, expected: str, got: str, hint: str) -> None:
        self.argument, self.expected, self.got, self.hint = argument, expected, got, hint
        super().__init__(f"{argument}: expected {expected}, got {got}; {hint}")


class ConfigError(ArgumentError):
    """A `HiPConfig` field, key or file that cannot be used."""


class BackendError(HipserveError, RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


class FitError(HipserveError):
    """The document, the request or the cache does not fit a limit; the message gives the sum."""


class NumericsError(HipserveError):
    """A result that is about to be timed is wrong; the message says which and by how much."""
