"""Samples of retrieval tasks: their length, what they hide, and where."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipserve import ArgumentError, FitError
from hipserve.lab import (
    make_sample,
)
from hipserve.lab.quality.puzzle import Question
from hipserve.lab.quality.tasks import PUZZLES, plant
from long_texts import HAY, ONE_PLACE, count, tasks


@tasks
@pytest.mark.parametrize("length", [900, 4000])
def test_samples_have_the_length_asked_for_and_repeat(task: str, length: int) -> None:
    samples = [make_sample(task, HAY, length, count, seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]
    assert all(0.97 * length <= count(sample) <= length for sample in samples)


@pytest.mark.parametrize("task", ONE_PLACE[:-1])
@given(seed=st.integers(0, 1000))
def test_facts_lie_in_the_text_and_hold_the_answers(task: str, seed: int) -> None:
    puzzle = PUZZLES[task](random.Random(seed))
    sample = make_sample(task, HAY, 2000, count, seed, questions=100)
    assert len(sample.questions) == len(puzzle.questions)
    assert len(sample.document.splitlines()) >= len(puzzle.facts)
    for asked in sample.questions:
        check_answer(sample.document, asked)


def check_answer(document: str, asked: Question) -> None:
    lines = document.splitlines()
    assert asked.answer not in HAY
    value = asked.answer.split()[-1].strip('"')
    holding = [line for line in lines if value in line]
    assert len(holding) >= 1, "the value of the answer is in the text"
    subject = re.findall(r"for (\w+) mentioned|key \"(\w+)\"", asked.question)
    if subject:
        key = "".join(subject[0])
        assert all(key in line for line in holding), "it stands beside what the question names"
        assert sum(f"{key}" in line for line in lines) == 1, "only one line answers"


@tasks
def test_more_questions_are_about_the_same_document(task: str) -> None:
    one, more = (make_sample(task, HAY, 2000, count, 5, questions) for questions in (1, 3))
    assert more.document == one.document
    assert more.questions[:1] == one.questions
    assert len(set(more.questions)) == len(more.questions) == (3 if task in ("niah", "kv") else 1)


def test_variables_form_one_chain() -> None:
    sample = make_sample("variables", HAY, 2000, count, 3)
    found = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.document)
    names = sample.questions[0].answer.split()
    value = re.findall(r"value (\d+)", sample.questions[0].question)[0]
    assert found == list(zip(names, [value, *names], strict=False))


def test_quotes_are_in_the_text_word_for_word() -> None:
    for seed in range(20):
        sample = make_sample("quote", HAY, 1500, count, seed)
        asked = sample.questions[0]
        given_words = asked.question.removeprefix("Continue the passage: ")
        assert f"{given_words} {asked.answer}" in sample.document
        assert (len(given_words.split()), len(asked.answer.split())) == (16, 32)


def test_facts_are_planted_at_their_depth() -> None:
    text = "a b c d e f g h i j" * 100
    depths = [0.0, 0.25, 0.5, 0.5, 1.0]
    facts = [f"<{i}>" for i in range(5)]
    planted = plant(text, facts, depths)
    for fact, depth in zip(facts, depths, strict=True):
        before = planted[: planted.index(f"\n{fact}\n")]
        assert abs(len(re.sub(r"\n<\d>\n", "", before)) - depth * len(text)) < 25
    assert re.sub(r"\n<\d>\n", "", planted) == text, "nothing but facts was added"


def test_unknown_tasks_and_short_texts() -> None:
    with pytest.raises(ArgumentError, match="task: expected one of passkey"):
        make_sample("pi", HAY, 1000, count, 0)
    with pytest.raises(FitError, match=r"too short for 10,000 tokens"):
        make_sample("passkey", "short", 10_000, count, 0)
    with pytest.raises(FitError, match="no stretch"):
        make_sample("kv", HAY, 30, count, 0)
