"""Load and faults of `hipserve serve` with the bundled model, in float32 so that answers compare.

    python benchmarks/load.py mixed --requests 2000 --clients 64 --longest 65536
    python benchmarks/load.py cancelled --requests 500
    python benchmarks/load.py exhausted --requests 200
    python benchmarks/load.py drained

Each prints what became of the requests, and ends with 1 where something was lost, wrong or left.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hipserve.config import HiPConfig
from hipserve.lab.prompts import english
from hipserve.lab.speed.load import Outcome, cancel_half, leftover, make_cases, run_mixed
from hipserve.lab.speed.serve import ask
from hipserve.models.bundled import bundled_path
from hipserve.serving.address import free_port
from hipserve.serving.child import Child, interrupt_on_signals
from hipserve.serving.client import Client
from hipserve.serving.command_line import Server
from hipserve.serving.running import running

ALONE = {"running": 0, "waiting": 0, "kv_usage": 0}


@contextmanager
def serving(*flags: str) -> Iterator[tuple[Server, Child]]:
    common = ("--enforce-eager", "--dtype", "float32", "--max-num-seqs", "64")
    server = Server(
        str(bundled_path()), "load", HiPConfig(), port=free_port(), flags=common + flags
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        running(server, Path(folder) / "log") as child,
    ):
        yield server, child


def good(outcome: Outcome) -> bool:
    return not outcome.lost + outcome.mixed_up + outcome.wrong


def mixed(requests: int, clients: int, longest: int) -> tuple[dict[str, Any], bool]:
    """Lengths from 16 tokens up."""
    with serving("--kv-cache-memory-bytes", str(6 << 30)) as (server, _):
        cases = make_cases(english(str(bundled_path())), requests, longest)
        outcome = run_mixed(server, cases, clients, checks=32)
        left = asdict(leftover(server))
    return {**asdict(outcome), "left": left}, good(outcome) and left == ALONE


def cancelled(requests: int, clients: int, longest: int) -> tuple[dict[str, Any], bool]:
    """Half of the clients go away mid-stream."""
    with serving("--kv-cache-memory-bytes", str(2 << 30)) as (server, _):
        cases = make_cases(english(str(bundled_path())), requests, min(longest, 4096))
        lost = cancel_half(server, cases, clients)
        left = asdict(leftover(server))
    return {"requests": requests, "lost": lost, "left": left}, not lost and left == ALONE


def exhausted(requests: int, clients: int, longest: int) -> tuple[dict[str, Any], bool]:
    """Clients that want several times the KV cache at once: 32 blocks of 256 tokens."""
    with serving("--num-gpu-blocks-override", "33", "--max-model-len", "8192") as (server, _):
        cases = make_cases(english(str(bundled_path())), requests, min(longest, 4096))
        outcome = run_mixed(server, cases, clients, checks=32)
        preempted = Client(server).metric("vllm:num_preemptions_total")
        left = asdict(leftover(server))
    done = {**asdict(outcome), "preempted": preempted, "left": left}
    return done, good(outcome) and left == ALONE


def drained(requests: int, clients: int, longest: int) -> tuple[dict[str, Any], bool]:
    """SIGTERM while 16 answers stream: all of them end, and so does the server."""
    del requests, clients, longest
    with serving("--max-model-len", "8192") as (server, child):
        with ThreadPoolExecutor(16) as pool:
            prompt = english(str(bundled_path())).make(512)
            answers = [pool.submit(ask, server, prompt, 200, str(i)) for i in range(16)]
            while Client(server).metric("vllm:num_requests_running") < 16:
                time.sleep(0.05)
            child.process.send_signal(signal.SIGTERM)
            tokens = [answer.result().num_tokens for answer in answers]
        code = child.process.wait(60)
    return {"tokens": tokens, "exit code": code}, tokens == [200] * 16 and code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    scenarios = {f.__name__: f for f in (mixed, cancelled, exhausted, drained)}
    parser.add_argument("scenario", choices=scenarios)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--longest", type=int, default=65536)
    options = parser.parse_args()
    interrupt_on_signals()
    report, passed = scenarios[options.scenario](options.requests, options.clients, options.longest)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return not passed


if __name__ == "__main__":
    sys.exit(main())
