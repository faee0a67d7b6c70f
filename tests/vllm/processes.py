"""Runs scenarios and servers in processes of their own, and ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hipserve.serving.child import Child

ENGINES = Path(__file__).with_name("engines.py")
QUIET = {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def scenarios(
    *names: str, folder: Path, script: Path = ENGINES, **environment: str
) -> dict[str, dict[str, Any]]:
    """The results of scenarios of `engines.py`, or of another script like it: one process runs
    them in turn, since vLLM takes longer to import than a small engine to start."""
    path = folder / f"{names[0]}.json"
    command = [sys.executable, str(script), *names, str(path)]
    done = subprocess.run(
        command, env={**os.environ, **QUIET, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(path.read_text())


@contextmanager
def serving(*flags: str, port: int, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A server that `hipserve serve` started, ready to answer."""
    command = [sys.executable, "-m", "hipserve", "serve", "--port", str(port), *flags]
    with log.open("w") as out:
        child = Child(command, {**os.environ, **QUIET}, copy=out, grace=90)
        try:
            ready = child.wait_until(lambda: any("ready " in line for line in child.log.last))
            assert ready, "\n".join(child.log.last_words())[-3000:]
            yield child.process
        finally:
            assert child.stop() != -signal.SIGKILL


def post(url: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of an answer as they come."""
    request = urllib.request.Request(url, json.dumps({**body, "stream": True}).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            data = line.removeprefix(b"data: ").strip()
            if data and data != b"[DONE]":
                yield json.loads(data)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()
