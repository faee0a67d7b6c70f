"""Does pruned attention still find what dense attention finds? Both answer the same questions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.evaluate.intervals import Interval, bootstrap, mean, wilson
from hipserve.evaluate.passes import greedy_hits
from hipserve.evaluate.tasks import Question, Sample, check_task, make_sample
from hipserve.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Score:
    """Mean score of one task under one attention, with its 95 % interval."""

    mean: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task: scores of dense and of each pruned attention on the same samples.

    `samples` counts questions; `difference` is pruned minus dense with a paired bootstrap interval.
    """

    task: str
    samples: int
    scores: dict[str, Score]
    difference: dict[str, Score]


@dataclass(frozen=True, slots=True)
class RetrievalReport:
    """All tasks at one length."""

    model: str
    length: int
    seed: int
    configs: dict[str, dict[str, Any]]
    results: list[TaskResult]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_retrieval(
    loaded: LoadedModel,
    configs: dict[str, HiPConfig | None],
    tasks: Sequence[str],
    text: str,
    *,
    length: int,
    samples: int,
    questions: int = 1,
    seed: int = 0,
    progress: Callable[[str, str, int], None] | None = None,
) -> RetrievalReport:
    """Scores the same seeded samples under every configuration.

    Args:
        configs: by name; None is dense attention. The first one is what others are compared to.
        tasks: of `hipserve.evaluate.TASKS`.
        text: the haystack.
        length: tokens of prompt and answer.
        samples: documents of each task.
        questions: about each document, which is read once for all of them, as far as the task has
            so many.
        progress: receives task, configuration and documents done.

    Raises:
        ArgumentError, FitError: unknown task, or a text or context too short for `length`.
    """
    for task in tasks:
        check_task(task)
    loaded.check_fit(length, 0)
    results: list[TaskResult] = []
    for task in tasks:
        rounds: dict[str, list[float]] = {name: [] for name in configs}
        exact = True
        for i in range(samples):
            count = functools.partial(_count, loaded)
            sample = make_sample(task, text, length, count, seed + i, questions)
            exact = sample.exact
            for name, config in configs.items():
                rounds[name] += score(loaded, config, sample)
                if progress:
                    progress(task, name, i + 1)
        results.append(_result(task, rounds, exact))
    settings = {name: config.to_dict() if config else {} for name, config in configs.items()}
    return RetrievalReport(loaded.name, length, seed, settings, results)


def score(loaded: LoadedModel, config: HiPConfig | None, sample: Sample) -> list[float]:
    """Of each question: 1 or 0 for an exact task, else the share of answer tokens that greedy
    decoding gets right."""
    loaded.use(config)
    prompts = [encode(loaded, sample.document, question) for question in sample.questions]
    answers = [_answer_ids(loaded, question) for question in sample.questions]
    hits = greedy_hits(loaded, prompts, answers)
    return [float(all(h)) if sample.exact else mean([float(hit) for hit in h]) for h in hits]


def encode(loaded: LoadedModel, document: str, question: Question) -> Tensor:
    """The prompt, `[1, tokens]`: two turns of the user."""
    contents = (document, question.question)
    return loaded.encode([{"role": "user", "content": content} for content in contents])


def _answer_ids(loaded: LoadedModel, question: Question) -> Any:
    ids = loaded.tokenizer(question.answer, add_special_tokens=False, return_tensors="pt")
    return ids["input_ids"][0].to(loaded.device)


def _count(loaded: LoadedModel, sample: Sample) -> int:
    """Tokens with the longest question and answer."""
    longest = max(sample.questions, key=lambda q: len(q.question) + len(q.answer))
    prompt = encode(loaded, sample.document, longest)
    return prompt.shape[1] + len(_answer_ids(loaded, longest))


def _result(task: str, rounds: dict[str, list[float]], exact: bool) -> TaskResult:
    names = list(rounds)
    base = rounds[names[0]]
    difference = {
        name: Score(*_with_bootstrap([b - a for a, b in zip(base, rounds[name], strict=True)]))
        for name in names[1:]
    }
    scores = {name: Score(*_with_interval(values, exact)) for name, values in rounds.items()}
    return TaskResult(task, len(base), scores, difference)


def _with_interval(values: list[float], exact: bool) -> tuple[float, Interval]:
    if exact:
        return mean(values), wilson(round(sum(values)), len(values))
    return _with_bootstrap(values)


def _with_bootstrap(values: list[float]) -> tuple[float, Interval]:
    return mean(values), bootstrap(values, mean)
