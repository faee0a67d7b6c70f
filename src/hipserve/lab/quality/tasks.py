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

WORDS = [
    "anchor",
    "apron",
    "badger",
    "barley",
    "basket",
    "beacon",
    "bishop",
    "blanket",
    "bonnet",
    "bridge",
    "bronze",
    "bucket",
    "candle",
    "canyon",
    "carpet",
    "castle",
    "cedar",
    "cellar",
    "cherry",
    "chimney",
    "cobble",
    "comet",
    "copper",
    "coral",
    "cradle",
    "cricket",
    "dagger",
    "dragon",
    "ember",
    "falcon",
    "feather",
    "fiddle",
    "flint",
    "forest",
    "garden",
    "garnet",
    "ginger",
    "goblet",
    "hammer",
    "harbor",
    "hazel",
    "helmet",
    "heron",
    "hollow",
    "island",
    "ivory",
    "jacket",
    "jasper",
    "kettle",
    "ladder",
    "lantern",
    "lemon",
    "linen",
    "lizard",
    "magnet",
    "maple",
    "marble",
    "meadow",
    "mirror",
    "mitten",
    "monkey",
    "mortar",
    "needle",
    "nutmeg",
    "oasis",
    "olive",
    "orchid",
    "otter",
    "paddle",
    "parrot",
    "pebble",
    "pepper",
    "pickle",
    "pigeon",
    "pillow",
    "pocket",
    "poplar",
    "quarry",
    "quiver",
    "rabbit",
    "raven",
    "ribbon",
    "river",
    "rocket",
    "saddle",
    "salmon",
    "shovel",
    "silver",
    "spider",
    "spruce",
    "sugar",
    "temple",
    "thimble",
    "timber",
    "trumpet",
    "tulip",
    "turnip",
    "velvet",
    "violin",
    "walnut",
    "weasel",
    "willow",
    "window",
    "yarrow",
]

READ = "Read the text."
MEMORIZE = "Some special values are hidden in the following text. Memorize them."
PASS_KEY_QUESTION = "What is the pass key?"
MAGIC_QUESTION = "What is the special magic number for {} mentioned in the provided text?"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what the model should say; or what it is given to complete, and how.

    Attributes:
        question, answer: of a conversation.
        cue, completion: of a running text, for models that know no conversation.
    """

    question: str
    answer: str
    cue: str
    completion: str


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


@dataclass(frozen=True, slots=True)
class Puzzle:
    """What a task hides in its text, in this order, and what can be asked about it."""

    opening: str
    facts: list[str]
    questions: list[Question]
    exact: bool = True


def pass_key(value: str) -> str:
    """The sentence that hides a pass key."""
    return f"The pass key is {value}. Remember it. {value} is the pass key."


def magic_number(key: str, value: str) -> str:
    """The sentence that hides the magic number of a word."""
    return f"One of the special magic numbers for {key} is: {value}."


def passkey(rng: random.Random) -> Puzzle:
    value = _digits(rng, 5)
    is_key = "The pass key is"
    asked = Question(PASS_KEY_QUESTION, f"{is_key} {value}", is_key, f" {value}")
    return Puzzle(READ, [pass_key(value)], [asked])


def niah(rng: random.Random) -> Puzzle:
    """Eight needles."""
    keys = rng.sample(WORDS, 8)
    values = {key: _digits(rng, 7) for key in keys}
    facts = [magic_number(key, value) for key, value in values.items()]
    form = "The special magic number for {} mentioned in the provided text is {}"
    questions = [
        Question(
            MAGIC_QUESTION.format(key),
            form.format(key, values[key]),
            f"One of the special magic numbers for {key} is:",
            f" {values[key]}",
        )
        for key in _one_first(rng, keys)
    ]
    return Puzzle(MEMORIZE, facts, questions)


def kv(rng: random.Random) -> Puzzle:
    """32 pairs of hexadecimal keys and values."""
    pairs = {_hex(rng): _hex(rng) for _ in range(32)}
    facts = [f'"{key}": "{value}",' for key, value in pairs.items()]
    questions = [
        Question(
            f'Which value is stored under the key "{key}"?',
            f'"{key}": "{pairs[key]}',
            f'"{key}":',
            f' "{pairs[key]}',
        )
        for key in _one_first(rng, list(pairs))
    ]
    return Puzzle(READ, facts, questions)


def _one_first(rng: random.Random, keys: list[str]) -> list[str]:
    """A random one, then the others in order."""
    first = rng.choice(keys)
    return [first, *(key for key in keys if key != first)]


def variables(rng: random.Random) -> Puzzle:
    """A chain of four assignments; the answer names every variable in it."""
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
    value = _digits(rng, 5)
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
) -> Sample:
    """A sample whose prompt and answer take 97 to 100 % of `length` tokens.

    Args:
        task: one of `TASKS`.
        text: the haystack; a random stretch of it is used.
        length: in tokens.
        count: tokens of the whole sample under the model's tokenizer and chat template.
        seed: the same seed, text and tokenizer give the same sample.
        questions: about the document, as far as the task has so many.

    Raises:
        ArgumentError: unknown task.
        FitError: the text is too short for `length`.
    """
    check_task(task)
    size, most = length * 3, None
    for _ in range(24):
        if size > len(text):
            raise FitError(
                f"the haystack is too short for {length:,} tokens: it has {len(text):,} characters "
                f"and {size:,} are needed",
                "give more text",
            )
        sample = _hide(task, text, size, random.Random(f"{task} {seed}"), questions)
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


def _hide(task: str, text: str, size: int, rng: random.Random, questions: int) -> Sample:
    place = rng.random()
    start = int(place * (len(text) - size))
    stretch = text[start : start + size]
    if task == "quote":
        return _quote(stretch, rng)
    puzzle = PUZZLES[task](rng)
    depths = sorted(rng.random() for _ in puzzle.facts)
    document = f"{puzzle.opening}\n\n{plant(stretch, puzzle.facts, depths)}"
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


def _quote(stretch: str, rng: random.Random) -> Sample:
    words = list(re.finditer(r"\S+", stretch))
    first = rng.randrange(len(words) // 20, len(words) * 9 // 10 - GIVEN - ASKED)
    begin, middle = words[first].start(), words[first + GIVEN].start()
    end = words[first + GIVEN + ASKED - 1].end()
    given = stretch[begin:middle].rstrip()
    rest = stretch[middle:end]
    asked = Question(f"Continue the passage: {given}", rest, given, f" {rest}")
    return Sample(f"{READ}\n\n{stretch}", (asked,), False)


def _digits(rng: random.Random, count: int) -> str:
    return str(rng.randrange(10 ** (count - 1), 10**count))


def _hex(rng: random.Random) -> str:
    return f"{rng.getrandbits(32):08x}"
