"""A server that runs as long as a `with` block, for programs that measure or test one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from hipserve.errors import HipserveError
from hipserve.serving.child import Child
from hipserve.serving.client import Client
from hipserve.serving.command_line import Server

START_SECONDS = 300


@contextmanager
def running(server: Server, log: Path) -> Generator[Child]:
    """The process of a server that answers; its output goes to a file.

    Raises:
        HipserveError: it does not start.
    """
    with (
        log.open("w", encoding="utf-8") as out,
        Child(server.command(), server.environment(), copy=out) as child,
    ):
        if not child.wait_until(Client(server).healthy, seconds=START_SECONDS):
            last = "\n".join(child.log.last_words()[-20:])
            raise HipserveError(f"the server for {server.name} did not start:\n{last}")
        yield child
