"""Speed of a server with HiP attention compared with the same engine's dense attention.

Both servers run at the same time and answer alternately, so other load affects both. Every prompt
hides a pass key; unless both servers find it, there are no numbers.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
import urllib.request
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hipserve.config import HiPConfig
from hipserve.errors import HipserveError
from hipserve.integrations.vllm.command import find_version
from hipserve.lab.prompts import KEY, Prompts, english
from hipserve.lab.provenance import provenance
from hipserve.serving.client import Client
from hipserve.serving.command_line import Server
from hipserve.serving.running import running

NEW_TOKENS = 64
PIECE = 16 * 1024
"""Prompts longer than two of these are read in pieces of so many tokens."""
QUIET_SECONDS = 1.5
"""How long a server is left alone before the other one is asked: for 1 s after their last message,
vLLM's processes look for the next one without a pause (`SpinCondition` of its `shm_broadcast`), on
the cores that the other server needs. A first token of 0.1 s took up to a second longer."""


class WrongAnswerError(HipserveError):
    """A server did not find what was hidden: its speed is worth nothing."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer: its text, seconds to its first token, seconds between the others.

    A server in a hurry sends several tokens at a time; `num_tokens` is its own count.
    """

    text: str
    first: float
    between: tuple[float, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt length, dense and HiP: medians over `answers` of each."""

    prompt_tokens: int
    answers: int
    dense_first_seconds: float
    hip_first_seconds: float
    first_ratio: float
    dense_decode_ms: float
    hip_decode_ms: float
    decode_ratio: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Several clients at once."""

    clients: int
    prompt_tokens: int
    dense_tokens_per_second: float
    hip_tokens_per_second: float
    ratio: float


def stream(
    server: Server, prompt: Sequence[int], max_tokens: int, salt: str
) -> Generator[dict[str, Any]]:
    """The events of a streamed answer; closing it early cancels the request.

    `salt` keeps prompts from meeting in the prefix cache.
    """
    body = {
        "model": server.name,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": salt,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=3600) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def ask(server: Server, prompt: Sequence[int], max_tokens: int, salt: str) -> Answer:
    """An answer, streamed to its end."""
    began, times, text, tokens = time.perf_counter(), list[float](), "", 0
    for event in stream(server, prompt, max_tokens, salt):
        if event["choices"]:
            times.append(time.perf_counter())
            text += event["choices"][0]["text"]
        else:
            tokens = event["usage"]["completion_tokens"]
    gaps = tuple(b - a for a, b in itertools.pairwise(times))
    return Answer(text, times[0] - began, gaps, tokens)


def ask_in_quiet(server: Server, prompt: Sequence[int], max_tokens: int, salt: str) -> Answer:
    """An answer while no other server of this machine is busy."""
    time.sleep(QUIET_SECONDS)
    return ask(server, prompt, max_tokens, salt)


def ask_in_turn(servers: Sequence[Server], prompt: Sequence[int]) -> list[Answer]:
    """What every server answers.

    A long prompt is read in pieces, each of them by all servers in turn: a piece is a request for
    one token, whose prefix the server has cached. The time to the first token is the sum.
    """
    salt = str(time.time_ns())
    read = [0.0] * len(servers)
    pieces = range(PIECE, len(prompt), PIECE) if len(prompt) > 2 * PIECE else ()
    for end in pieces:
        for i, server in enumerate(servers):
            read[i] += ask_in_quiet(server, prompt[:end], 1, salt).first
    answers = [ask_in_quiet(server, prompt, NEW_TOKENS, salt) for server in servers]
    return [
        replace(answer, first=answer.first + seconds)
        for answer, seconds in zip(answers, read, strict=True)
    ]


def measure(dense: Server, hip: Server, prompts: Prompts, length: int, *, repeats: int = 3) -> Row:
    """Dense and HiP in turn, the medians of `repeats` answers each; one of a prompt in pieces.

    Raises:
        WrongAnswerError: an answer lacks the pass key.
    """
    answers: dict[str, list[Answer]] = {dense.name: [], hip.name: []}
    repeats = 1 if length > 2 * PIECE else repeats
    for repeat in range(repeats):
        of_all = ask_in_turn((dense, hip), prompts.make(length, repeat))
        for server, answer in zip((dense, hip), of_all, strict=True):
            check(server, length, answer)
            answers[server.name].append(answer)
    first = {name: statistics.median(a.first for a in of) for name, of in answers.items()}
    decode = {
        name: 1e3 * statistics.median(gap for a in of for gap in a.between)
        for name, of in answers.items()
    }
    return Row(
        prompt_tokens=length,
        answers=repeats,
        dense_first_seconds=first[dense.name],
        hip_first_seconds=first[hip.name],
        first_ratio=first[dense.name] / first[hip.name],
        dense_decode_ms=decode[dense.name],
        hip_decode_ms=decode[hip.name],
        decode_ratio=decode[dense.name] / decode[hip.name],
    )


def check(server: Server, length: int, answer: Answer) -> None:
    """Raises WrongAnswerError where the pass key is missing."""
    if KEY not in answer.text:
        raise WrongAnswerError(
            f"{server.name} did not find the pass key in {length:,} tokens, it said "
            f"{answer.text[:60]!r}: no numbers"
        )


def measure_together(
    dense: Server, hip: Server, prompts: Prompts, length: int, *, clients: int = 8, rounds: int = 2
) -> Throughput:
    """Tokens per second that `clients` get together, the median of `rounds` each, in turn."""
    rates: dict[str, list[float]] = {dense.name: [], hip.name: []}
    for turn in range(rounds):
        for server in (dense, hip):
            rates[server.name].append(_rate(server, prompts, length, clients, turn))
    speed = {name: statistics.median(of) for name, of in rates.items()}
    ratio = speed[hip.name] / speed[dense.name]
    return Throughput(clients, length, speed[dense.name], speed[hip.name], ratio)


def _rate(server: Server, prompts: Prompts, length: int, clients: int, turn: int) -> float:
    def one(client: int) -> int:
        prompt = prompts.make(length, client)
        return ask(server, prompt, NEW_TOKENS, f"{turn}-{client}-{time.time_ns()}").num_tokens

    time.sleep(QUIET_SECONDS)
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(one, range(clients)))
    return tokens / (time.perf_counter() - began)


def compare(
    model: str,
    lengths: Sequence[int],
    config: HiPConfig,
    folder: Path,
    ports: tuple[int, int],
    *,
    flags: Sequence[str] = (),
    repeats: int = 3,
    on_row: Callable[[Row], None] | None = None,
) -> tuple[list[Row], Throughput]:
    """Starts both servers and measures them at every length.

    Raises:
        HipserveError: a server does not start.
        WrongAnswerError: an answer is wrong.
    """
    prompts = english(model)
    dense = Server(model, "dense", None, port=ports[0], flags=tuple(flags))
    hip = replace(dense, name="hip", config=config, port=ports[1])
    with running(dense, folder / "dense.log"), running(hip, folder / "hip.log"):
        for server in (dense, hip):
            ask(server, prompts.make(256), 8, "warm-up")
        rows: list[Row] = []
        longest = Client(dense).facts().max_context - NEW_TOKENS
        for length in lengths:
            rows.append(measure(dense, hip, prompts, min(length, longest), repeats=repeats))
            if on_row:
                on_row(rows[-1])
        return rows, measure_together(dense, hip, prompts, min(lengths))


def as_csv(rows: Sequence[Row], together: Throughput, command: str) -> str:
    """Where the numbers come from, in comments; then one line a length."""
    facts = {
        "command": command,
        **provenance("wall").to_dict(),
        "threads": len(os.sched_getaffinity(0)),  # of a server; this process measures
        "vllm": find_version(),
        "together": f"{together.clients} clients x {together.prompt_tokens} tokens: "
        f"dense {together.dense_tokens_per_second:.1f}, hip {together.hip_tokens_per_second:.1f} "
        "tokens/s",
    }
    lines = [f"# {name}: {value}" for name, value in facts.items()]
    lines.append(",".join(asdict(rows[0])))
    for row in rows:
        values = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in asdict(row).values())
        lines.append(",".join(values))
    return "\n".join(lines) + "\n"
