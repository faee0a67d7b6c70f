"""Does pruned attention still find what dense attention finds? Both answer the same questions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.lab.intervals import Interval, bootstrap, mean, wilson
from hipserve.lab.quality.passes import check_length, greedy_hits
from hipserve.lab.quality.tasks import Question, Sample, check_task, make_sample
from hipserve.models import LoadedModel

Form = Literal["chat", "continuation"]


@dataclass(frozen=True, slots=True)
class Score:
    """Mean score of one task under one attention, with its 95 % interval; None from too few."""

    mean: float
    interval: Interval | None


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
    form: Form
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
    form: Form | None = None,
    seed: int = 0,
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
        progress: receives task, configuration and documents done.

    Raises:
        ArgumentError, FitError: unknown task, or a text or context too short for `length`.
    """
    for task in tasks:
        check_task(task)
    check_length(loaded, length)
    form = form or default_form(loaded)
    results: list[TaskResult] = []
    for task in tasks:
        rounds: dict[str, list[float]] = {name: [] for name in configs}
        exact = True
        for i in range(samples):
            count = functools.partial(_count, loaded, form)
            sample = make_sample(task, text, length, count, seed + i, questions)
            exact = sample.exact
            for name, config in configs.items():
                rounds[name] += score(loaded, config, sample, form)
                if progress:
                    progress(task, name, i + 1)
        results.append(_result(task, rounds, exact))
    settings = {name: config.to_dict() if config else {} for name, config in configs.items()}
    return RetrievalReport(loaded.name, form, length, seed, settings, results)


def default_form(loaded: LoadedModel) -> Form:
    """`chat` where the model has a chat template; a base model has none."""
    return "chat" if getattr(loaded.tokenizer, "chat_template", None) else "continuation"


def score(
    loaded: LoadedModel, config: HiPConfig | None, sample: Sample, form: Form = "chat"
) -> list[float]:
    """Of each question: 1 or 0 for an exact task, else the share of answer tokens that greedy
    decoding gets right."""
    loaded.use(config)
    pairs = [_encode(loaded, sample.document, question, form) for question in sample.questions]
    hits = greedy_hits(loaded, [prompt for prompt, _ in pairs], [answer for _, answer in pairs])
    return [float(all(h)) if sample.exact else mean([float(hit) for hit in h]) for h in hits]


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


def _result(task: str, rounds: dict[str, list[float]], exact: bool) -> TaskResult:
    names = list(rounds)
    base = rounds[names[0]]
    difference = {
        name: Score(*_with_bootstrap([b - a for a, b in zip(base, rounds[name], strict=True)]))
        for name in names[1:]
    }
    scores = {name: Score(*_with_interval(values, exact)) for name, values in rounds.items()}
    return TaskResult(task, len(base), scores, difference)


def _with_interval(values: list[float], exact: bool) -> tuple[float, Interval | None]:
    if exact:
        return mean(values), wilson(round(sum(values)), len(values))
    return _with_bootstrap(values)


def _with_bootstrap(values: list[float]) -> tuple[float, Interval | None]:
    return mean(values), bootstrap(values, mean)
