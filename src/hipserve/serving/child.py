"""A server's process: started, watched until it is ready, read, asked to stop, ended."""

from __future__ import annotations

import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, TextIO

from hipserve.serving.command_line import DRAIN_SECONDS

LAST_LINES = 400
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Log:
    """The lines that a process writes, read as they come.

    They go to `copy` where one is given; else they wait for `next` and `follow`.
    """

    def __init__(self, written: IO[str], copy: TextIO | None = None) -> None:
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._copy = copy
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(written,), daemon=True)
        self._reader.start()

    def _read(self, written: IO[str]) -> None:
        with written:
            for line in written:
                self.last.append(line.rstrip("\n"))
                if self._copy is None:
                    self._lines.put(line.rstrip("\n"))
                else:
                    _pass_on(line, self._copy)
        self._lines.put(None)

    def next(self, timeout: float) -> str | None:
        """The next line; None if none came in time, or no more will."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)
        return line

    def follow(self, out: TextIO) -> None:
        """Writes lines to `out` until the log ends."""
        while (line := self._lines.get()) is not None:
            _pass_on(line + "\n", out)
        self._lines.put(None)

    def last_words(self) -> list[str]:
        """The last lines, after half a second without a new one."""
        while self.next(timeout=0.5) is not None:
            pass
        return list(self.last)

    def finish(self) -> None:
        """Reads what a process that ended has left, unless another still holds its output."""
        self._reader.join(timeout=5)


def _pass_on(line: str, out: TextIO) -> None:
    with suppress(ValueError):  # a closed file: the reader is gone, and the server goes on
        out.write(line)
        out.flush()


class Child:
    """A server's process and all that it starts: they end with the `with` block around it.

    Attributes:
        process: what was started; it leads its own process group.
        log: standard output and error, together.
        ready: it answers.
        stopping: a signal to this process asked it to end.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        copy: TextIO | None = None,
        grace: float = DRAIN_SECONDS + 15,
    ) -> None:
        """Starts `command`; its lines go to `copy`; it gets `grace` seconds to end."""
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.log = Log(self.process.stdout, copy)
        self.ready = self.stopping = False
        self._grace = grace

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def pass_signals_on(self) -> None:
        """From now on SIGINT, SIGTERM and SIGHUP to this process stop the child instead."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        """The first signal lets requests end, within the server's time; the second does not."""
        if self.stopping or not self.ready:
            self._signal(signal.SIGKILL)
        self.stopping = True
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            elif self.running:
                self.process.send_signal(number)

    def wait_until(
        self,
        is_ready: Callable[[], bool],
        tell: Callable[[str | None], None] = lambda _: None,
        seconds: float = math.inf,
    ) -> bool:
        """Waits until the child is ready; False if it ended first or took too long.

        Meanwhile `tell` gets every line of its log, and None five times a second.
        """
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            if is_ready():
                self.ready = True
                return True
            line = self.log.next(timeout=0.2)
            while line is not None:
                tell(line)
                line = self.log.next(timeout=0)
            tell(None)
        return False

    def stop(self) -> int:
        """Ends the child if it runs, and what is left of its processes.

        Returns its exit code: negative for a signal, 0 if a signal to this process stopped it.
        """
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self._grace)
        self._signal(signal.SIGKILL)
        code = self.process.wait()
        self.log.finish()
        return 0 if self.stopping else code


def interrupt_on_signals() -> None:
    """SIGTERM and SIGHUP unwind this process as Ctrl-C does: no child outlives it."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
