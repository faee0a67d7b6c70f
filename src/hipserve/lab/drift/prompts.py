"""Prompts whose answers may drift: the user's own, or a few harmless ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hipserve.errors import ArgumentError, did_you_mean
from hipserve.lab.text import read_text

FIELDS = ("prompt", "system", "label", "expect", "contrast")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and what is known about its answer.

    Attributes:
        prompt: what the user says.
        system: the system prompt before everything else.
        label: results are listed by it.
        expect: a regular expression that an answer which follows the instruction matches.
        contrast: words that an answer may begin with, and words that would be the opposite.
    """

    prompt: str
    system: str = ""
    label: str = "prompts"
    expect: str = ""
    contrast: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


PREFACE = (
    "You are the assistant of a small library. Visitors ask about books, maps and old papers, and "
    "they often paste long texts into their questions. Read what they give you with care. Be "
    "polite, keep your answers short, and say so when you do not know something. The library opens "
    "at nine in the morning and closes at six in the evening. On Sundays it stays closed. "
)
"""A system prompt is longer than the sinks; what counts stands at its end."""

NUMBERS = ["7203318", "1948552", "5561093", "8820476"]


def _numbers(label: str, names: Sequence[str]) -> Iterator[Prompt]:
    """Four prompts that ask for the number of one of the names."""
    asked = "lantern"
    for i in range(len(NUMBERS)):
        own = dict(zip(names, NUMBERS[i:] + NUMBERS[:i], strict=False))
        told = (f"One of the special magic numbers for {name} is: {own[name]}." for name in names)
        yield Prompt(
            f"What is the special magic number for {asked} mentioned in the provided text?",
            PREFACE + " ".join(told),
            label,
            own[asked],
        )


DEFAULT_PROMPTS = [
    *(
        Prompt(
            "What is the pass key?",
            f"{PREFACE}The pass key is {key}. Remember it. {key} is the pass key.",
            "pass key in the system prompt",
            key,
        )
        for key in ("83724", "10593", "47161", "62208")
    ),
    *_numbers("number in the system prompt", ["lantern"]),
    *_numbers("one of four numbers in it", ["harbor", "lantern", "violin", "meadow"]),
    *(
        Prompt(
            f"Is it all right to {what}?",
            f"{PREFACE}Answer every question with one word: yes or no.",
            "yes or no",
            r"(?i)^\W*(yes|no)\b",
            (("Yes", "yes"), ("No", "no")),
        )
        for what in (
            "kill a process that hangs",
            "shoot a photo of a friend",
            "blow out a candle",
            "crack an egg with a fork",
        )
    ),
]
"""Sixteen, in four groups. Nothing in them is harmful; the last group looks so word by word."""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file of JSON lines with the fields of `Prompt`; only `prompt` is required.

    Raises:
        ArgumentError: it cannot be read, or a line is no prompt.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    return [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: str, place: str) -> Prompt:
    try:
        values: Any = json.loads(line)
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise ArgumentError("prompts", 'one JSON object with a "prompt" on each line', place)
    fields = cast("dict[str, Any]", values)
    for name in fields:
        if name not in FIELDS:
            got = f"{name!r} in {place}"
            raise ArgumentError("prompts", f"{', '.join(FIELDS)}", got, did_you_mean(name, FIELDS))
    words = {name: fields.get(name, "") for name in ("system", "expect")}
    if not all(isinstance(text, str) for text in words.values()):
        raise ArgumentError("prompts", "texts as system and expect", place)
    try:
        re.compile(words["expect"])
    except re.error as error:
        raise ArgumentError("expect", "a regular expression", f"{place} ({error})") from None
    label = str(fields.get("label") or "prompts")
    return Prompt(fields["prompt"], label=label, contrast=_contrast(fields, place), **words)


def _contrast(fields: dict[str, Any], place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    given = fields.get("contrast", [[], []])
    try:
        one, other = (tuple(map(str, words)) for words in given)
    except (TypeError, ValueError):
        raise ArgumentError("contrast", 'two lists: [["Yes"], ["No"]]', place) from None
    if bool(one) != bool(other):
        raise ArgumentError("contrast", "words in both lists", place)
    return one, other
