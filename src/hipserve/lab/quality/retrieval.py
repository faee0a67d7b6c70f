"""Does pruned attention still find what dense attention finds? Both answer the same questions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.lab.intervals import (
    Estimate,
    Interval,
    design_effect,
    estimate_clusters,
    estimate_flips,
    mean,
    wilson,
)
from hipserve.lab.quality.controls import BLIND, FLOOR, not_caught, with_controls
from hipserve.lab.quality.passes import check_length, read_answers
from hipserve.lab.quality.puzzle import Question
from hipserve.lab.quality.tasks import Sample, check_task, make_sample
from hipserve.lab.verdicts import MARGINS, Verdict, judge, judge_all
from hipserve.models import LoadedModel

Form = Literal["chat", "continuation"]
LOW = 0.5
"""Mean score of the reference below which losses hide."""


@dataclass(frozen=True, slots=True)
class Score:
    """Mean score of one task under one attention, with its 95 % interval; None from too few."""

    mean: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Flips:
    """Answers under one attention compared with the reference, question by question.

    Attributes:
        lost, gained: questions with a lower and with a higher score.
        nats: change of the log-probability of the right answer, mean over questions.
        nats_interval: 95 % interval of that; None from too few documents.
        verdict: on the change of the mean score.
    """

    lost: int
    gained: int
    nats: float
    nats_interval: Interval | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task: scores of dense and of each pruned attention on the same samples.

    `samples` counts questions; `difference` is pruned minus dense. Intervals are over documents:
    questions about one document are not independent.
    """

    task: str
    samples: int
    scores: dict[str, Score]
    difference: dict[str, Score]
    flips: dict[str, Flips]


@dataclass(frozen=True, slots=True)
class RetrievalReport:
    """All tasks at one length, with sentences on what the numbers cannot show."""

    model: str
    form: Form
    length: int
    seed: int
    margin: float
    configs: dict[str, dict[str, Any]]
    results: list[TaskResult]
    warnings: list[str]

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
    form: Form | None = None,
    seed: int = 0,
    margin: float = MARGINS["answers"],
    controls: bool = False,
    depth: float | None = None,
    progress: Callable[[str, str, int], None] | None = None,
) -> RetrievalReport:
    """Scores the same seeded samples under every configuration.

    Args:
        configs: by name; None is dense attention. The first one is what others are compared to.
        tasks: of `hipserve.lab.TASKS`.
        text: the haystack.
        length: tokens of prompt and answer.
        samples: documents of each task.
        questions: about each document, which is read once for all of them, as far as the task has
            so many.
        form: `chat` asks in the model's chat template; `continuation` lets it complete a sentence,
            which a base model can, too; by whether the model has a template if None.
        margin: difference of mean scores that counts as none.
        controls: measure two rows more, as `evaluate_fidelity` does.
        depth: of what the first question asks for; see `make_sample`.
        progress: receives task, configuration and the number of the document before each pass.

    Raises:
        ArgumentError, FitError: unknown task, or a text or context too short for `length`.
    """
    for task in tasks:
        check_task(task)
    check_length(loaded, length)
    form = form or default_form(loaded)
    configs = with_controls(configs) if controls else configs
    results: list[TaskResult] = []
    changes: list[dict[str, Estimate]] = []
    for task in tasks:
        rounds: dict[str, list[list[Scored]]] = {name: [] for name in configs}
        exact = True
        for i in range(samples):
            count = functools.partial(_count, loaded, form)
            sample = make_sample(
                task, text, length, count, seed + i, questions=questions, depth=depth
            )
            exact = sample.exact
            asked = encode_questions(loaded, sample, form)
            for name, config in configs.items():
                if progress:
                    progress(task, name, i + 1)
                rounds[name].append(score(loaded, config, asked, exact))
        changes.append(_changes(rounds, exact))
        results.append(_result(task, rounds, exact, changes[-1], margin))
    results = _corrected(results, changes, margin)
    return RetrievalReport(
        model=loaded.name,
        form=form,
        length=length,
        seed=seed,
        margin=margin,
        configs={name: config.to_dict() if config else {} for name, config in configs.items()},
        results=results,
        warnings=_warnings(results, next(iter(configs))),
    )


def default_form(loaded: LoadedModel) -> Form:
    """`chat` where the model has a chat template; a base model has none."""
    return "chat" if getattr(loaded.tokenizer, "chat_template", None) else "continuation"


class Scored(NamedTuple):
    """One question: its score, and the log-probability of the right answer."""

    score: float
    nats: float


def encode_questions(
    loaded: LoadedModel, sample: Sample, form: Form = "chat"
) -> list[tuple[Tensor, Tensor]]:
    """Prompt `[1, tokens]` and answer `[tokens]` of each question."""
    return [_encode(loaded, sample.document, question, form) for question in sample.questions]


def score(
    loaded: LoadedModel,
    config: HiPConfig | None,
    asked: Sequence[tuple[Tensor, Tensor]],
    exact: bool,
) -> list[Scored]:
    """The score of each question, prompt `[1, tokens]` and answer `[tokens]`: 1 or 0 for an exact
    task, else the share of answer tokens that greedy decoding gets right."""
    loaded.use(config)
    found = read_answers(loaded, [prompt for prompt, _ in asked], [answer for _, answer in asked])
    return [
        Scored(float(all(hits)) if exact else mean([float(hit) for hit in hits]), nats)
        for hits, nats in found
    ]


def encode(loaded: LoadedModel, document: str, question: Question) -> Tensor:
    """The prompt, `[1, tokens]`: two turns of the user."""
    contents = (document, question.question)
    return loaded.encode([{"role": "user", "content": content} for content in contents])


def _answer_ids(loaded: LoadedModel, question: Question) -> Any:
    ids = loaded.tokenizer(question.answer, add_special_tokens=False, return_tensors="pt")
    return ids["input_ids"][0].to(loaded.device)


def _encode(
    loaded: LoadedModel, document: str, question: Question, form: Form
) -> tuple[Tensor, Tensor]:
    """Prompt `[1, tokens]` and answer `[tokens]`."""
    if form == "chat":
        return encode(loaded, document, question), _answer_ids(loaded, question)
    return _running_text(loaded, f"{document}\n\n{question.cue}", question.completion)


def _running_text(loaded: LoadedModel, text: str, completion: str) -> tuple[Tensor, Tensor]:
    """Split where the tokens of the text with and without its completion differ: tokenizers join
    words across the cut."""
    options = {"return_tensors": "pt"}
    whole = loaded.tokenizer(text + completion, **options)["input_ids"].to(loaded.device)
    begun = loaded.tokenizer(text, **options)["input_ids"].to(loaded.device)
    size = min(whole.shape[1] - 1, begun.shape[1])
    cut = int((whole[0, :size] == begun[0, :size]).int().cumprod(0).sum())
    return whole[:, :cut], whole[0, cut:]


def _count(loaded: LoadedModel, form: Form, sample: Sample) -> int:
    """Tokens with the longest question and answer."""
    longest = max(sample.questions, key=lambda q: len(q.question) + len(q.answer))
    prompt, answer = _encode(loaded, sample.document, longest, form)
    return prompt.shape[1] + len(answer)


def _changes(rounds: dict[str, list[list[Scored]]], exact: bool) -> dict[str, Estimate]:
    """The change of the mean score, under every attention but the first."""
    names = list(rounds)
    return {name: _change(rounds[names[0]], rounds[name], exact) for name in names[1:]}


def _result(
    task: str,
    rounds: dict[str, list[list[Scored]]],
    exact: bool,
    changes: dict[str, Estimate],
    margin: float,
) -> TaskResult:
    base = rounds[next(iter(rounds))]
    scores = {name: _score(documents, exact) for name, documents in rounds.items()}
    difference = {
        name: Score(scores[name].mean - next(iter(scores.values())).mean, change.interval())
        for name, change in changes.items()
    }
    flips = {
        name: _flips(base, rounds[name], judge(change, margin)) for name, change in changes.items()
    }
    return TaskResult(task, sum(map(len, base)), scores, difference, flips)


def _corrected(
    results: list[TaskResult], changes: list[dict[str, Estimate]], margin: float
) -> list[TaskResult]:
    """Verdicts of all tasks and configurations but the controls, which are given at once."""
    given = [
        (i, name) for i, own in enumerate(changes) for name in own if name not in (FLOOR, BLIND)
    ]
    verdicts = judge_all([changes[i][name] for i, name in given], margin)
    found = [dict(result.flips) for result in results]
    for (i, name), verdict in zip(given, verdicts, strict=True):
        found[i][name] = replace(found[i][name], verdict=verdict)
    return [replace(result, flips=own) for result, own in zip(results, found, strict=True)]


def _score(documents: list[list[Scored]], exact: bool) -> Score:
    scores = [[question.score for question in document] for document in documents]
    measured = estimate_clusters(scores)
    if not exact:
        return Score(measured.value, measured.interval())
    effect, count = design_effect(scores), sum(map(len, scores))
    return Score(measured.value, wilson(measured.value * count / effect, count / effect))


def _change(base: list[list[Scored]], other: list[list[Scored]], exact: bool) -> Estimate:
    """The change of the mean score; of exact answers with the interval of lost and gained ones."""
    changes = [
        [b.score - a.score for a, b in zip(before, after, strict=True)]
        for before, after in zip(base, other, strict=True)
    ]
    return estimate_flips(_signs(base, other)) if exact else estimate_clusters(changes)


def _signs(base: list[list[Scored]], other: list[list[Scored]]) -> list[list[int]]:
    return [
        [(b.score > a.score) - (b.score < a.score) for a, b in zip(before, after, strict=True)]
        for before, after in zip(base, other, strict=True)
    ]


def _flips(base: list[list[Scored]], other: list[list[Scored]], verdict: Verdict) -> Flips:
    nats = estimate_clusters(
        [
            [b.nats - a.nats for a, b in zip(before, after, strict=True)]
            for before, after in zip(base, other, strict=True)
        ]
    )
    flat = [sign for signs in _signs(base, other) for sign in signs]
    return Flips(flat.count(-1), flat.count(1), nats.value, nats.interval(), verdict)


def _warnings(results: list[TaskResult], reference: str) -> list[str]:
    found: list[str] = []
    for row in results:
        right = row.scores[reference].mean
        if right < LOW:
            found.append(f"{row.task}: {reference} scores {right:.2f}, which leaves little to lose")
        for name, flips in row.flips.items():
            if name == BLIND and flips.verdict.decision != "different":
                found.append(f"{row.task}: {not_caught(name)}")
            if flips.verdict.decision == "different" and row.difference[name].mean > 0:
                found.append(
                    f"{row.task}: {name} scores higher than {reference} by more than the margin; "
                    "look for a fault of the measurement"
                )
    return found
