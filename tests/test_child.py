"""The one supervisor of server processes, with programs that take no second to start."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hipserve.config import HiPConfig
from hipserve.errors import HipserveError
from hipserve.serving.child import LAST_LINES, Child
from hipserve.serving.command_line import Server
from hipserve.serving.running import running

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
program = "import time; print('up', flush=True); time.sleep(60)"
worker = subprocess.Popen([sys.executable, "-c", program])
print("worker", worker.pid, flush=True)
time.sleep(60)
"""
"""A server that heeds no SIGTERM, and a worker that it started."""


def program(text: str, **options: float) -> Child:
    return Child([sys.executable, "-c", text], os.environ, **options)


def said(child: Child, words: str) -> bool:
    return child.wait_until(lambda: any(words in line for line in child.log.last), seconds=30)


def alive(pid: int) -> bool:
    """A process that has ended may wait for a parent that asks for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_ends_before_it_is_ready_tells_its_last_words() -> None:
    with program("import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)") as child:
        assert not child.wait_until(lambda: False)
        assert sorted(child.log.last_words()) == ["one", "two"]
    assert not child.ready
    assert child.stop() == 3


def test_every_line_of_a_start_is_told_and_so_is_silence() -> None:
    told: list[str | None] = []
    with program("import time; print('a\\nb', flush=True); time.sleep(0.7)") as child:
        assert not child.wait_until(lambda: False, told.append)
    assert [line for line in told if line] == ["a", "b"]
    assert told.count(None) >= 2


def test_a_start_that_takes_too_long_is_given_up() -> None:
    began = time.monotonic()
    with program("import time; time.sleep(60)") as child:
        assert not child.wait_until(lambda: False, seconds=0.5)
    assert time.monotonic() - began < 10


def test_the_log_of_years_keeps_its_end_in_memory_and_goes_on_where_it_is_sent() -> None:
    out = io.StringIO()
    with program(f"for i in range({LAST_LINES + 50}): print(i)") as child:
        child.log.follow(out)
    assert out.getvalue().split() == [str(i) for i in range(LAST_LINES + 50)]
    assert child.log.last_words() == [str(i) for i in range(50, LAST_LINES + 50)]


def test_a_copy_that_was_closed_holds_up_no_server(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as out:
        text = "import time; print('first', flush=True); time.sleep(0.5); print('line\\n' * 2**18)"
        child = Child([sys.executable, "-c", text], os.environ, copy=out)
        assert said(child, "first")
    assert child.process.wait(30) == 0
    assert path.read_text() == "first\n"


def test_stop_ends_what_does_not_listen_and_all_that_it_started() -> None:
    child = program(STUBBORN, grace=0.5)
    assert said(child, "up")
    (worker,) = (int(x.split()[1]) for x in child.log.last if x.startswith("worker"))
    assert alive(worker)
    assert child.stop() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert child.stop() == -signal.SIGKILL  # again: nothing happens


PARENT = """
import sys
from hipserve.serving.child import Child, interrupt_on_signals
child = Child([sys.executable, "-c", '''import signal, sys, time
def leave(*_):
    print("bye", flush=True)
    time.sleep(0.3)
    sys.exit(7)
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
time.sleep(60)'''], None)
%s
with child:
    assert child.wait_until(lambda: "up" in child.log.last)
    sys.stdout.write(f"{child.process.pid}\\n")
    sys.stdout.flush()
    child.log.follow(sys.stdout)
    sys.exit(child.stop())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("how", "code"), [("child.pass_signals_on()", 0), ("interrupt_on_signals()", None)]
)
def test_no_child_outlives_its_parent(number: signal.Signals, how: str, code: int | None) -> None:
    """A child that is told to stop says its last words; its parent ends with it."""
    command = [sys.executable, "-c", PARENT % how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        pid = int(p.stdout.readline())
        p.send_signal(number)
        rest, error = p.communicate(timeout=30)
    assert not alive(pid)
    if code is not None:
        assert (p.returncode, rest, error) == (code, "bye\n", "")
    else:
        assert "KeyboardInterrupt" in error


def test_a_server_that_does_not_start_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    monkeypatch.setattr(Server, "command", lambda self: command)
    log = tmp_path / "log"
    with (
        pytest.raises(HipserveError, match=r"the server for hip did not start:\nno such model"),
        running(Server("m", "hip", HiPConfig()), log),
    ):
        pass
    assert log.read_text() == "no such model\n"


class Slow(io.StringIO):
    def write(self, text: str, /) -> int:
        time.sleep(0.3)
        return super().write(text)


def test_a_copy_holds_the_last_line() -> None:
    """Also what a server says while it stops."""
    text = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('bye'))\n"
    command, out = [sys.executable, "-c", f"{text}print('up', flush=True); time.sleep(60)"], Slow()
    with Child(command, os.environ, copy=out) as child:
        assert said(child, "up")
    assert out.getvalue() == "up\nbye\n"
