"""Tasks over several places of a text, after RULER (arXiv 2404.06654), in forms that a small model
knows: many keys, several values, several questions at once, chains among chains, order, frequent
words.

Each says what it catches that a single needle does not.
"""

from __future__ import annotations

import itertools
import random

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

OFTEN, SELDOM = 96, 64
"""How often the words of `frequent` occur: dense attention tells 3 from 2, a budget sees few."""


def multikey(rng: random.Random) -> Puzzle:
    """49 needles whose keys are pairs of words: each word belongs to seven keys.

    A search that finds one word of the key finds the wrong needles, too.
    """
    words = rng.sample(WORDS, 14)
    keys = [f"{a} {b}" for a, b in itertools.product(words[:7], words[7:])]
    rng.shuffle(keys)
    values = {key: digits(rng, 7) for key in keys}
    asked = one_first(rng, keys)
    questions = [
        Question(
            MAGIC_QUESTION.format(key),
            f"The special magic number for {key} mentioned in the provided text is {values[key]}",
            f"One of the special magic numbers for {key} is:",
            f" {values[key]}",
        )
        for key in asked
    ]
    facts = [magic_number(key, value) for key, value in values.items()]
    return Puzzle(MEMORIZE, facts, questions, asked=keys.index(asked[0]))


def multivalue(rng: random.Random) -> Puzzle:
    """Four values of one key, among those of four other keys: a budget has to cover four places."""
    key, *others = rng.sample(WORDS, 5)
    values = [digits(rng, 7) for _ in range(4)]
    facts = [magic_number(key, value) for value in values]
    for other in others:
        facts.insert(rng.randrange(len(facts) + 1), magic_number(other, digits(rng, 7)))
    listed = ", ".join(values)
    question = Question(
        f"What are all the special magic numbers for {key} mentioned in the provided text?",
        f"The special magic numbers for {key} mentioned in the provided text are {listed}",
        f"In this order, the special magic numbers for {key} are:",
        f" {listed}",
    )
    return Puzzle(MEMORIZE, facts, [question], exact=False)


def multiquery(rng: random.Random) -> Puzzle:
    """Four of eight keys in one answer: every value is looked for again while answering."""
    keys = rng.sample(WORDS, 8)
    values = {key: digits(rng, 7) for key in keys}
    asked = rng.sample(keys, 4)
    names = f"{', '.join(asked[:-1])} and {asked[-1]}"
    listed = ", ".join(f"{key}: {values[key]}" for key in asked)
    question = Question(
        f"What are the special magic numbers for {names} mentioned in the provided text?",
        listed,
        f"The special magic numbers for {names} are these.",
        f" {listed}",
    )
    facts = [magic_number(key, value) for key, value in values.items()]
    return Puzzle(MEMORIZE, facts, [question], exact=False)


def chains(rng: random.Random) -> Puzzle:
    """Four chains of four assignments, interleaved; one is asked for.

    What a step has to find depends on what the step before it found.
    """
    names = [variable_names(rng, 5) for _ in range(4)]
    values = [digits(rng, 5) for _ in names]
    lines = [
        [f"VAR {own[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(own)]
        for own, value in zip(names, values, strict=True)
    ]
    order = [i for i, own in enumerate(lines) for _ in own]
    rng.shuffle(order)
    facts = [lines[i].pop(0) for i in order]
    answer = " ".join(names[0])
    question = Question(
        f"Find all variables that are assigned the value {values[0]} in the text above.",
        answer,
        f"The variables that are assigned the value {values[0]} in the text above are:",
        f" {answer}",
    )
    return Puzzle(READ, facts, [question], exact=False)


def frequent(rng: random.Random) -> Puzzle:
    """The more frequent of two words, over 160 places: aggregation, which no budget covers."""
    more, less = rng.sample(WORDS, 2)
    words = [more] * OFTEN + [less] * SELDOM
    rng.shuffle(words)
    question = Question(
        "Which word of the day is the most frequent in the text above?",
        f"The word of the day is {more}",
        "The word of the day is",
        f" {more}",
    )
    return Puzzle(READ, [f"The word of the day is {word}." for word in words], [question])


def order(rng: random.Random) -> Puzzle:
    """Which of two values of a key comes first, for four keys: both have to be found, and where.

    Half of the answers are right where one of the two is named by chance.
    """
    keys = rng.sample(WORDS, 4)
    places = [key for key in keys for _ in range(2)]
    rng.shuffle(places)
    needles = [(key, digits(rng, 7)) for key in places]
    questions = [_first_value(key, next(v for k, v in needles if k == key)) for key in keys]
    return Puzzle(MEMORIZE, [magic_number(*needle) for needle in needles], questions)


def _first_value(key: str, value: str) -> Question:
    return Question(
        f"Which of the special magic numbers for {key} comes first in the provided text?",
        f"The first of the special magic numbers for {key} in the provided text is {value}",
        f"In this order, the special magic numbers for {key} are:",
        f" {value}",
    )
