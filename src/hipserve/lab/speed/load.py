"""Many clients at once: no request may get lost, mixed up with another, or leave anything behind.

Every prompt hides its own pass key, and some of the requests are asked again, one at a time.
"""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import TypeVar

from hipserve.lab.prompts import Prompts
from hipserve.lab.speed.serve import Answer, ask, stream
from hipserve.serving.client import Client
from hipserve.serving.command_line import Server

FRAME = 128
"""Tokens from which on a prompt has room for a question and what it asks for."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Case:
    """One request; `key` is empty where the prompt is too short to hide one."""

    prompt: list[int]
    key: str
    new_tokens: int
    salt: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the requests.

    Attributes:
        lost: requests that failed, or got fewer tokens than they asked for.
        hidden, found: prompts that hide a key, and answers that name it.
        mixed_up: answers that name the key of another request.
        checked, wrong: requests asked again one at a time, and those with another answer then.
    """

    requests: int
    lost: int
    hidden: int
    found: int
    mixed_up: int
    checked: int
    wrong: int
    longest: int
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Leftover:
    """What an idle server holds: requests, and a share of the KV cache."""

    running: float
    waiting: float
    kv_usage: float


def make_cases(prompts: Prompts, count: int, longest: int, seed: int = 0) -> list[Case]:
    """Prompts of 16 tokens, of 32, and so on up to `longest`; an octave is 1.4x rarer each time."""
    draw = random.Random(seed)
    lengths = [longest, *(2**n for n in range(4, 32) if 2**n < longest)]
    chosen = draw.choices(lengths, [length**-0.5 for length in lengths], k=count - 1)
    return [_case(prompts, draw, i, n) for i, n in enumerate([longest, *chosen])]


def _case(prompts: Prompts, draw: random.Random, place: int, length: int) -> Case:
    key = str(draw.randrange(10_000, 100_000)) if length >= FRAME else ""
    prompt = prompts.make(max(length, FRAME), place, key)
    return Case(prompt[:length], key, draw.randrange(12, 33), "load")


def _ask(server: Server, case: Case) -> Answer | None:
    try:
        return ask(server, case.prompt, case.new_tokens, case.salt)
    except (OSError, HTTPException):
        return None


def run_mixed(server: Server, cases: Sequence[Case], clients: int, checks: int) -> Outcome:
    """All cases by so many clients; then `checks` of them one at a time, the longest included."""
    began = time.perf_counter()
    answers = at_once(clients, lambda case: _ask(server, case), cases)
    seconds = time.perf_counter() - began
    pairs = list(zip(cases, answers, strict=True))
    good = [(c, a) for c, a in pairs if a is not None and a.num_tokens == c.new_tokens]
    spread = sorted(good, key=lambda pair: -len(pair[0].prompt))
    asked_again = spread[:: max(len(spread) // max(checks, 1), 1)][:checks]
    keys = {case.key for case in cases}
    wrong = 0
    for case, answer in asked_again:
        again = _ask(server, case)
        wrong += again is None or again.text != answer.text
    return Outcome(
        requests=len(cases),
        lost=len(cases) - len(good),
        hidden=sum(bool(c.key) for c, _ in good),
        found=sum(bool(c.key) and c.key in a.text for c, a in good),
        mixed_up=sum(bool((keys - {c.key}) & set(re.findall(r"\d{5}", a.text))) for c, a in good),
        checked=len(asked_again),
        wrong=wrong,
        longest=max(len(c.prompt) for c in cases),
        prompt_tokens=sum(len(c.prompt) for c in cases),
        seconds=seconds,
    )


def cancel_half(server: Server, cases: Sequence[Case], clients: int) -> int:
    """Every other client goes away mid-stream; how many of the others lost their answer."""

    def one(place: int) -> bool:
        case = cases[place]
        if place % 2:
            answer = _ask(server, case)
            return answer is not None and answer.num_tokens == case.new_tokens
        events = stream(server, case.prompt, case.new_tokens, case.salt)
        list(itertools.islice(events, 1 + place % 8))
        events.close()
        return True

    return at_once(clients, one, range(len(cases))).count(False)


def leftover(server: Server) -> Leftover:
    """What is left one step later: a request of one token makes the server count again."""
    ask(server, [1] * 16, 1, "leftover")
    metric = Client(server).metric
    return Leftover(
        metric("vllm:num_requests_running"),
        metric("vllm:num_requests_waiting"),
        metric("vllm:kv_cache_usage_perc"),
    )


def at_once(clients: int, one: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`one` of every item, by so many threads."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, items))
