"""What a long measurement is doing: a spinner on a terminal, elsewhere a line for every step."""

from __future__ import annotations

import time
from pathlib import Path

from rich.status import Status

from hipserve.cli.files import write
from hipserve.cli.output import err, say


class Steps:
    """Shows the steps of a measurement on stderr, and writes them to a log.

    A terminal shows the step that runs, and keeps the lines of `note`. A file or a pipe gets a
    line when a step begins, with the minutes and seconds since the first.

    Attributes:
        log: a file that gets the same lines as a pipe; None for none.
    """

    def __init__(self, title: str, log: Path | None = None) -> None:
        self.log = log
        self._status: Status | None = err.status(title) if err.is_terminal else None

    def __enter__(self) -> Steps:
        self._began = time.monotonic()
        if self.log:
            write("--out", self.log, "")
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def update(self, step: str) -> None:
        """A step begins."""
        if self._status:
            self._status.update(step)
        self._line(step, shown=not self._status)

    def note(self, text: str) -> None:
        """A line that stays on a terminal too, such as how long a part took."""
        self._line(text, shown=True)

    def _line(self, text: str, *, shown: bool) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        line = f"{minutes}:{seconds:02} {text}"
        if shown:
            say(line)
        if self.log:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
