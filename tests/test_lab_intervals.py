"""Intervals and verdicts hold as often as they say: by simulation."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from hipserve.lab.intervals import (
    Estimate,
    design_effect,
    estimate,
    estimate_change,
    estimate_clusters,
    estimate_flips,
    student,
)
from hipserve.lab.verdicts import MAX_UNITS, judge

ROUNDS = 1000


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        *((0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 3, 3.1824), (0.95, 5, 2.0150)),
        *((0.95, 11, 1.7959), (0.975, 30, 2.0423), (0.8, 10, 0.8791), (0.995, 100, 2.6259)),
        *((0.975, 5000, 1.9600), (0.5, 7, 0.0)),
    ],
)
def test_student_is_the_published_table(probability: float, freedom: int, expected: float) -> None:
    assert student(probability, freedom) == pytest.approx(expected, abs=1e-4)


def document(rng: random.Random, truth: float, tokens: int = 20) -> float:
    """The mean of tokens that share the document's own deviation."""
    own = rng.gauss(truth, 1.0)
    return sum(rng.gauss(own, 1.0) for _ in range(tokens)) / tokens


def covered(sample: Callable[[random.Random], Estimate], truth: float, level: float) -> float:
    rng, hits = random.Random(0), 0
    for _ in range(ROUNDS):
        interval = sample(rng).interval(level)
        assert interval is not None
        hits += interval[0] <= truth <= interval[1]
    return hits / ROUNDS


@pytest.mark.parametrize("documents", [4, 12])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_an_interval_over_documents_covers_the_truth(documents: int, level: float) -> None:
    def sample(rng: random.Random) -> Estimate:
        return estimate([document(rng, 3.0) for _ in range(documents)])

    assert covered(sample, 3.0, level) == pytest.approx(level, abs=0.025)


def test_tokens_as_units_would_not() -> None:
    """What clusters are for: 4 of 5 such intervals miss."""

    def sample(rng: random.Random) -> Estimate:
        owns = [rng.gauss(0.0, 1.0) for _ in range(6)]
        return estimate([rng.gauss(own, 1.0) for own in owns for _ in range(50)])

    assert covered(sample, 0.0, 0.95) < 0.6


def test_an_interval_over_unequal_domains_covers_the_truth() -> None:
    weights = [1 / 5] * 5 + [1 / 3] * 3 + [1 / 2] * 4

    def sample(rng: random.Random) -> Estimate:
        return estimate([document(rng, 1.0) for _ in weights], weights)

    assert covered(sample, 1.0, 0.95) == pytest.approx(0.95, abs=0.03)


def test_an_interval_of_a_change_covers_the_truth() -> None:
    """Documents differ far more than attentions do; pairs take that out."""

    def sample(rng: random.Random) -> Estimate:
        base = [rng.uniform(1.5, 3.5) for _ in range(12)]
        return estimate_change(base, [a * rng.gauss(1.004, 0.003) for a in base])

    assert covered(sample, 0.004, 0.95) == pytest.approx(0.95, abs=0.025)
    assert sample(random.Random(1)).error == pytest.approx(0.003 / 12**0.5, rel=0.5)


def test_weights_and_too_few_units() -> None:
    assert estimate([1.0, 4.0], [2.0, 1.0]).value == 2.0
    assert estimate([1.0, 2.0, 3.0]).interval() is None
    assert estimate([2.0] * 4).interval() == (2.0, 2.0)
    assert estimate([1.0, 2.0, 3.0, 4.0]).effective == 4
    assert estimate_change([2.0, 2.0], [1.0, 2.0]).value == -0.25


def decided(truth: float, documents: int, margin: float = 0.5) -> dict[str, float]:
    """Share of each verdict on documents of deviation 0.5."""
    rng, found = random.Random(3), {"same": 0.0, "different": 0.0, "undecided": 0.0}
    for _ in range(ROUNDS):
        values = [rng.gauss(truth, 0.5) for _ in range(documents)]
        found[judge(estimate(values), margin).decision] += 1 / ROUNDS
    return found


@pytest.mark.parametrize("truth", [0.5, -0.5])
@pytest.mark.parametrize("documents", [5, 20])
def test_a_difference_of_the_margin_passes_once_in_twenty(truth: float, documents: int) -> None:
    found = decided(truth, documents)
    assert found["same"] <= 0.065
    assert found["different"] <= 0.065


def test_with_enough_documents_verdicts_are_right() -> None:
    assert decided(0.0, 14)["same"] > 0.9
    assert decided(1.0, 14)["different"] > 0.9
    assert decided(0.0, 4)["undecided"] > 0.3


@pytest.mark.parametrize("truth", [0.0, 0.3, 0.9])
def test_so_many_documents_more_decide_four_times_in_five(truth: float) -> None:
    """A pilot whose mean and spread are the truth, and then as many as it asks for."""
    pilot = Estimate(truth, 0.5 / 2.0, 4, 4.0)
    verdict = judge(pilot, 0.5)
    assert verdict.decision == "undecided"
    assert verdict.more is not None
    right = "same" if truth < 0.5 else "different"
    assert 0.72 < decided(truth, 4 + verdict.more)[right] < 0.92


def test_what_no_number_of_documents_decides() -> None:
    assert judge(Estimate(0.5, 0.1, 12, 12.0), 0.5).more is None
    assert judge(estimate([0.1, 0.2]), 0.5).more == 2
    assert judge(Estimate(0.0, 0.4, 12, 12.0), 0.5).more in range(1, MAX_UNITS)
    assert judge(estimate([0.0] * 4), 0.5).decision == "same"


def flips(rng: random.Random, lost: float, gained: float, questions: int, rho: float) -> list[int]:
    """Of one document: each question copies the document's own draw with probability sqrt(rho)."""

    def draw() -> int:
        x = rng.random()
        return -1 if x < lost else int(x < lost + gained)

    own = draw()
    return [own if rng.random() < rho**0.5 else draw() for _ in range(questions)]


@pytest.mark.parametrize(("questions", "rho"), [(1, 0.0), (8, 0.0), (8, 0.2)])
def test_an_interval_of_flips_covers_the_truth(questions: int, rho: float) -> None:
    def sample(rng: random.Random) -> Estimate:
        count = 320 // questions
        return estimate_flips([flips(rng, 0.05, 0.03, questions, rho) for _ in range(count)])

    # several questions about a document are trusted less than these deserve
    assert 0.93 < covered(sample, -0.02, 0.95) < (0.98 if questions == 1 else 1)


@pytest.mark.parametrize(("questions", "rho"), [(1, 0.0), (8, 0.2)])
@pytest.mark.parametrize("documents", [12, 80])
def test_lost_answers_of_the_margin_pass_once_in_twenty(
    documents: int, questions: int, rho: float
) -> None:
    rng, passed = random.Random(1), 0
    for _ in range(ROUNDS):
        found = [flips(rng, 0.06, 0.01, questions, rho) for _ in range(documents)]
        passed += judge(estimate_flips(found), 0.05).decision == "same"
    assert passed / ROUNDS < 0.075


def test_planted_losses_are_found_and_equal_answers_accepted() -> None:
    rng = random.Random(2)
    found = {"same": 0, "different": 0, "undecided": 0}
    for _ in range(200):
        lossy = [flips(rng, 0.12, 0.01, 8, 0.1) for _ in range(60)]
        found[judge(estimate_flips(lossy), 0.02).decision] += 1
    assert found["different"] > 180
    equal = [[0] * 8 for _ in range(120)]
    assert judge(estimate_flips(equal), 0.02).decision == "same"
    few = judge(estimate_flips(equal[:10]), 0.02)
    assert few.decision == "undecided"
    assert few.more is not None
    enough = [[0] * 8 for _ in range(10 + few.more // 8 + 1)]
    assert judge(estimate_flips(enough), 0.02).decision == "same"


def test_few_documents_of_many_questions_are_judged_and_single_questions_are_not() -> None:
    """What is missing is counted in questions, as the units are."""
    estimated = estimate_flips([[0] * 8, [0, -1, 0, 0, 0, 0, 0, 0], [0] * 8])
    assert estimated.interval() is not None
    more = judge(estimated, 0.02).more
    assert more is not None
    assert more > 0
    assert estimate_flips([[0], [0], [-1]]).interval() is None
    assert judge(estimate_flips([[0], [0], [-1]]), 0.02).more == 1


def test_questions_of_a_document_count_by_their_design_effect() -> None:
    """Eight equal questions are one; independent ones are eight; one for each document is one."""
    rng = random.Random(0)
    scores = [float(rng.random() < 0.5) for _ in range(100)]
    assert design_effect([[score] * 8 for score in scores]) == pytest.approx(8, rel=0.02)
    apart = [[float(rng.random() < 0.5) for _ in range(8)] for _ in range(200)]
    assert design_effect(apart) < 1.3
    assert design_effect([[score] for score in scores]) == 1.0
    assert estimate_clusters([[1.0], [0.0, 0.0, 0.0]]).value == 0.25
