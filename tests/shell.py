"""The command as tests call it: in this process, as a process, or to be refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hipserve.cli import main as command

HIPSERVE = Path(sys.executable).with_name("hipserve")


def invoke(*words: str, stdin: str | None = None) -> Result:
    """In this process: quick, but without `main`'s treatment of errors."""
    return CliRunner().invoke(command.app, list(words), input=stdin)


def call(*words: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[str]:
    """As a shell would: a process, its streams and its exit code."""
    done = subprocess.run(
        [HIPSERVE, *words], input=stdin, capture_output=True, timeout=240, env={**os.environ, **env}
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str):
    """Exit code, error and hint of a call that fails: on stderr, with nothing on stdout."""
    monkeypatch.setattr(sys, "argv", ["hipserve", *words])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "Traceback" not in streams.err
    line, *hints = [line for line in streams.err.splitlines() if line.strip()]
    assert len(hints) <= 1, streams.err
    assert all(hint.startswith("hint: ") for hint in hints)
    return exit_.value.code, line, "".join(hints).removeprefix("hint: ")
