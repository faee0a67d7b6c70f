"""Retrieval tasks: generated, seeded, hidden in any text, in forms that the bundled model knows.

They follow RULER (arXiv 2404.06654): passkey, multi-key needles, key-value pairs, variable
tracking; `quote` continues a passage of the text word for word. An answer ends with its value: how
a model closes the sentence does not matter.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hipserve.errors import ArgumentError, FitError, did_you_mean
from hipserve.lab.quality.long_range import (
    chains,
    frequent,
    multikey,
    multiquery,
    multivalue,
    order,
)
from hipserve.lab.quality.puzzle import (
    MAGIC_QUESTION,
    MEMORIZE,
    READ,
    Puzzle,
    Question,
    digits,
    magic_number,
    one_first,
    variable_names,
)
from hipserve.lab.quality.words import WORDS

PASS_KEY_QUESTION = "What is the pass key?"


@dataclass(frozen=True, slots=True)
class Sample:
    """Questions about one document.

    Attributes:
        document: the first user turn, instruction and text.
        questions: second user turns, each directly after the document.
        exact: answers are scored all or nothing; by the share of right tokens otherwise.
    """

    document: str
    questions: tuple[Question, ...]
    exact: bool


def pass_key(value: str) -> str:
    """The sentence that hides a pass key."""
    return f"The pass key is {value}. Remember it. {value} is the pass key."


def passkey(rng: random.Random) -> Puzzle:
    value = digits(rng, 5)
    is_key = "The pass key is"
    asked = Question(PASS_KEY_QUESTION, f"{is_key} {value}", is_key, f" {value}")
    return Puzzle(READ, [pass_key(value)], [asked], asked=0)


def niah(rng: random.Random) -> Puzzle:
    """Eight needles."""
    keys = rng.sample(WORDS, 8)
    values = {key: digits(rng, 7) for key in keys}
    facts = [magic_number(key, value) for key, value in values.items()]
    form = "The special magic number for {} mentioned in the provided text is {}"
    order = one_first(rng, keys)
    questions = [
        Question(
            MAGIC_QUESTION.format(key),
            form.format(key, values[key]),
            f"One of the special magic numbers for {key} is:",
            f" {values[key]}",
        )
        for key in order
    ]
    return Puzzle(MEMORIZE, facts, questions, asked=keys.index(order[0]))


def kv(rng: random.Random) -> Puzzle:
    """32 pairs of hexadecimal keys and values."""
    pairs = {_hex(rng): _hex(rng) for _ in range(32)}
    facts = [f'"{key}": "{value}",' for key, value in pairs.items()]
    keys = list(pairs)
    order = one_first(rng, keys)
    questions = [
        Question(
            f'Which value is stored under the key "{key}"?',
            f'"{key}": "{pairs[key]}',
            f'"{key}":',
            f' "{pairs[key]}',
        )
        for key in order
    ]
    return Puzzle(READ, facts, questions, asked=keys.index(order[0]))


def variables(rng: random.Random) -> Puzzle:
    """A chain of four assignments; the answer names every variable in it."""
    names = variable_names(rng, 5)
    value = digits(rng, 5)
    facts = [f"VAR {names[0]} = {value}"]
    facts += [f"VAR {name} = VAR {source}" for source, name in itertools.pairwise(names)]
    question = f"Find all variables that are assigned the value {value} in the text above."
    cue = f"The variables that are assigned the value {value} in the text above are:"
    answer = " ".join(names)
    return Puzzle(READ, facts, [Question(question, answer, cue, f" {answer}")], exact=False)


PUZZLES: dict[str, Callable[[random.Random], Puzzle]] = {
    "passkey": passkey,
    "niah": niah,
    "kv": kv,
    "variables": variables,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "chains": chains,
    "order": order,
    "frequent": frequent,
}
TASKS = (*PUZZLES, "quote")
GIVEN, ASKED = 16, 32
"""Words of a passage that `quote` gives and asks for."""


def make_sample(
    task: str,
    text: str,
    length: int,
    count: Callable[[Sample], int],
    seed: int,
    questions: int = 1,
    depth: float | None = None,
) -> Sample:
    """A sample whose prompt and answer take 97 to 100 % of `length` tokens.

    Args:
        task: one of `TASKS`.
        text: the haystack; a random stretch of it is used.
        length: in tokens.
        count: tokens of the whole sample under the model's tokenizer and chat template.
        seed: the same seed, text and tokenizer give the same sample.
        questions: about the document, as far as the task has so many.
        depth: of what the first question asks for, from 0 (the beginning) to 1; random if None.

    Raises:
        ArgumentError: unknown task, or one whose answer is not in one place, with a `depth`.
        FitError: the text is too short for `length`.
    """
    check_task(task)
    if depth is not None:
        check_depth(task, depth)
    size, most = length * 3, None
    for _ in range(24):
        if size > len(text):
            raise FitError(
                f"the haystack is too short for {length:,} tokens: it has {len(text):,} characters "
                f"and {size:,} are needed",
                "give more text",
            )
        sample = _hide(task, text, size, random.Random(f"{task} {seed}"), questions, depth)
        tokens = count(sample)
        if 0.97 * length <= tokens <= length:
            return sample
        most = size if tokens > length else most
        size = int(size * 0.985 * length / tokens)
        size = min(size, most - 1) if most else size
    raise FitError(f"no stretch of the haystack makes a {task} sample of {length:,} tokens")


def check_task(task: str) -> None:
    if task not in TASKS:
        raise ArgumentError(
            "task", f"one of {', '.join(TASKS)}", repr(task), did_you_mean(task, TASKS)
        )


def check_depth(task: str, depth: float) -> None:
    """Raises ArgumentError for no depth, or a task whose first answer is not in one place."""
    check_task(task)
    if not 0 <= depth <= 1:
        raise ArgumentError("depth", "a share from 0 to 1", str(depth))
    if task != "quote" and PUZZLES[task](random.Random(0)).asked is None:
        expected = "a task whose answer is in one place: passkey, niah, kv, multikey or quote"
        raise ArgumentError("task", expected, repr(task))


def _hide(
    task: str, text: str, size: int, rng: random.Random, questions: int, depth: float | None
) -> Sample:
    place = rng.random()
    start = int(place * (len(text) - size))
    stretch = text[start : start + size]
    if task == "quote":
        return _quote(stretch, rng, depth)
    puzzle = PUZZLES[task](rng)
    depths = sorted(rng.random() for _ in puzzle.facts)
    facts = puzzle.facts
    if depth is not None and puzzle.asked is not None:
        depths[puzzle.asked] = depth
        facts = [fact for _, fact in sorted(zip(depths, facts, strict=True), key=lambda x: x[0])]
        depths.sort()
    document = f"{puzzle.opening}\n\n{plant(stretch, facts, depths)}"
    return Sample(document, tuple(puzzle.questions[:questions]), puzzle.exact)


def plant(text: str, facts: Sequence[str], depths: Sequence[float]) -> str:
    """The text with each fact on a line of its own, at the first gap after its depth (0 to 1).

    Depths ascend; 0.5 is the middle of the text.
    """
    parts, done = [], 0
    for depth, fact in zip(depths, facts, strict=True):
        gap = re.compile(r"\s").search(text, max(int(depth * len(text)), done))
        at = gap.start() if gap else len(text)
        parts += [text[done:at], "\n", fact, "\n"]
        done = at
    return "".join([*parts, text[done:]])


def _quote(stretch: str, rng: random.Random, depth: float | None) -> Sample:
    words = list(re.finditer(r"\S+", stretch))
    low, high = len(words) // 20, len(words) * 9 // 10 - GIVEN - ASKED
    first = rng.randrange(low, high) if depth is None else low + int(depth * (high - low - 1))
    begin, middle = words[first].start(), words[first + GIVEN].start()
    end = words[first + GIVEN + ASKED - 1].end()
    given = stretch[begin:middle].rstrip()
    rest = stretch[middle:end]
    asked = Question(f"Continue the passage: {given}", rest, given, f" {rest}")
    return Sample(f"{READ}\n\n{stretch}", (asked,), False)


def _hex(rng: random.Random) -> str:
    return f"{rng.getrandbits(32):08x}"
