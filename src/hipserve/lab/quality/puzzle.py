"""What a task hides in a text and asks for, and what tasks share."""

from __future__ import annotations

import random
from dataclasses import dataclass

READ = "Read the text."
MEMORIZE = "Some special values are hidden in the following text. Memorize them."
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
class Puzzle:
    """What a task hides in its text, in this order, and what can be asked about it.

    Attributes:
        opening: the instruction before the text.
        facts: lines of their own in the text.
        questions: about them.
        exact: answers are scored all or nothing; by the share of right tokens otherwise.
        asked: the fact that answers the first question; None where it takes several.
    """

    opening: str
    facts: list[str]
    questions: list[Question]
    exact: bool = True
    asked: int | None = None


def magic_number(key: str, value: str) -> str:
    """The sentence that hides the magic number of a word."""
    return f"One of the special magic numbers for {key} is: {value}."


def one_first(rng: random.Random, keys: list[str]) -> list[str]:
    """A random one, then the others in order."""
    first = rng.choice(keys)
    return [first, *(key for key in keys if key != first)]


def variable_names(rng: random.Random, count: int) -> list[str]:
    """Words of five capital letters."""
    return ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(count)]


def digits(rng: random.Random, count: int) -> str:
    """A number of so many digits."""
    return str(rng.randrange(10 ** (count - 1), 10**count))
