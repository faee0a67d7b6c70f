"""What a report measures, at a scale that a small machine can afford."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hipserve.config import DEFAULT, HiPConfig
from hipserve.errors import ArgumentError, did_you_mean
from hipserve.lab import meter as meter_shown
from hipserve.lab import seconds as seconds_shown
from hipserve.lab.cache import shown as cache_shown
from hipserve.lab.cache.report import CacheReport, measure_cache
from hipserve.lab.drift import shown as drift_shown
from hipserve.lab.drift.measure import DriftReport, evaluate_drift
from hipserve.lab.drift.prompts import DEFAULT_PROMPTS
from hipserve.lab.locality import shown as locality_shown
from hipserve.lab.locality.report import LocalityReport, measure_locality
from hipserve.lab.meter import MeterReport, measure_meter
from hipserve.lab.provenance import provenance
from hipserve.lab.quality import shown as quality_shown
from hipserve.lab.quality.beside import Reference
from hipserve.lab.quality.controls import BLIND, Dense, blind, everything, faster_dense
from hipserve.lab.quality.fidelity import FidelityReport, evaluate_fidelity
from hipserve.lab.quality.retrieval import RetrievalReport, evaluate_retrieval
from hipserve.lab.report.page import Page, Section
from hipserve.lab.representative import shown as representative_shown
from hipserve.lab.representative.report import RepresentativeReport, measure_representatives
from hipserve.lab.samples import Sample, cut_samples
from hipserve.lab.seconds import Seconds, measured
from hipserve.lab.shown import counted
from hipserve.lab.text import Document
from hipserve.models import LoadedModel

QUALITY_DOCUMENTS, FLOOR_DOCUMENTS = 4, 1
"""Documents read at the full length, as many as an interval over documents takes; and those of them
that dense attention reads again, by its slower kernels, to show its noise."""
TASKS, TASK_DOCUMENTS, TASK_QUESTIONS = ("niah", "kv"), 2, 8
DRIFT_LENGTH, DRIFT_PROMPTS = 12288, DEFAULT_PROMPTS[::4]
"""Tokens of the contexts that prompts stand in, and one prompt of each group."""
HEADS_LENGTH = 8192
"""Tokens of the texts on which splits and the meter are judged: as those of longer texts."""
LOSS_LENGTH, LOSS_BUDGET, LOSS_HEADS = 4096, 256, 24
"""Tokens of the text that is read once for a head, what it may read of them, and how many heads."""

MANY = 6
"""Texts that the page names."""

DENSE_KERNELS: dict[Dense, str] = {
    "sdpa": "torch's SDPA; the noise floor is of the kernels that serve, on the first text",
    "hip": "the kernels that serve, reading every key; the noise floor is SDPA, on the first text",
}
CALIBRATION = (
    "none here, since a verdict takes twelve documents or more: `hipserve calibrate --text FILE`"
)

Result = (
    FidelityReport
    | RetrievalReport
    | DriftReport
    | CacheReport
    | RepresentativeReport
    | LocalityReport
    | MeterReport
)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LabReport:
    """The results of all parts, by name; tables, charts and pages are made of them.

    Attributes:
        length: of the longest texts.
        config: what is compared with dense attention.
        facts: machine, versions, commit and date.
        results: by part.
        seconds: by part, in the order of measurement.
    """

    model: str
    length: int
    config: dict[str, Any]
    facts: dict[str, Any]
    results: dict[str, Result]
    seconds: dict[str, Seconds]

    def to_dict(self) -> dict[str, Any]:
        results = {part: result.to_dict() for part, result in self.results.items()}
        seconds = {part: asdict(took) for part, took in self.seconds.items()}
        return {"model": self.model, "facts": self.facts, "results": results, "seconds": seconds}

    def to_page(self) -> Page:
        sections = [*map(_section, self.results.values()), self._time()]
        facts = {name: str(value) for name, value in self.facts.items() if value}
        facts["calibration"] = CALIBRATION
        return Page(f"{self.model}: what pruned attention keeps", facts, sections)

    def _time(self) -> Section:
        facts, budget = self.facts, self.config["budget"]
        machine = f"{facts['cpu']}, {facts['isa']}, {counted(facts['threads'], 'thread')}"
        command = f"hipserve lab report {self.model} --length {self.length}{_option(budget)}"
        return Section("Time", command, [], [seconds_shown.grid(self.seconds, machine)], [])


def _option(budget: int) -> str:
    return f" --budget {budget}" if budget != DEFAULT.budget else ""


def _dense_option(result: FidelityReport | RetrievalReport) -> str:
    return " --dense hip" if result.configs["dense"] else ""


def _section(result: Result) -> Section:
    compared = isinstance(result, FidelityReport | RetrievalReport)
    config = result.configs["hip"] if compared else result.config
    budget = _option(config["budget"])
    length = result.lengths[0] if isinstance(result, DriftReport) else result.length
    size = f"--length {length}{budget}"
    match result:
        case FidelityReport():
            return Section(
                "Compared with dense attention",
                f"hipserve lab quality {result.model} {size}{_dense_option(result)}",
                [*quality_shown.sentences(result), *result.warnings],
                [quality_shown.grid(result)],
                quality_shown.charts(result),
            )
        case RetrievalReport():
            tasks = ",".join(row.task for row in result.results)
            return Section(
                "Answers",
                f"hipserve lab quality {result.model} {size} --tasks {tasks} "
                f"--samples {TASK_DOCUMENTS} --questions {TASK_QUESTIONS}{_dense_option(result)}",
                [*quality_shown.answers_sentences(result), *result.warnings],
                [quality_shown.answers_grid(result)],
                [],
            )
        case DriftReport():
            return Section(
                "System prompts in long contexts",
                f"hipserve lab drift {result.model} --lengths {length}{budget}",
                [result.scope, *result.warnings],
                drift_shown.grids(result),
                [],
            )
        case CacheReport():
            return Section(
                "Caches of blocks",
                f"hipserve lab cache {result.model} {size} --steps {result.steps}",
                [],
                cache_shown.grids(result),
                cache_shown.charts(result),
            )
        case RepresentativeReport():
            return Section(
                "Which key may stand for a range",
                f"hipserve lab representative {result.model} {size} --rows {result.rows}",
                [],
                representative_shown.grids(result),
                representative_shown.charts(result),
            )
        case LocalityReport():
            return Section(
                "Locality",
                f"hipserve lab locality {result.model} {size} --rows {result.rows}"
                f" --heads {LOSS_HEADS}",
                [],
                locality_shown.grids(result),
                locality_shown.charts(result),
            )
        case MeterReport():
            return Section(
                "Attention that is left unread",
                f"hipserve lab meter {result.model} {size}",
                meter_shown.sentences(result),
                meter_shown.grids(result),
                meter_shown.charts(result),
            )


def make_report(
    loaded: LoadedModel,
    config: HiPConfig,
    documents: Sequence[Document],
    *,
    length: int,
    parts: Sequence[str] = (),
    progress: Say | None = None,
    note: Say | None = None,
    dense: Dense | None = None,
    finished: Callable[[LabReport], None] | None = None,
) -> LabReport:
    """Measures every part, or those that are named.

    Quality and caches are measured at `length`; heads on shorter texts, as far as `length` allows.

    Args:
        progress: receives part and step when a step begins.
        note: receives what each part took, when it ends.
        dense: kernels of dense attention; the faster ones of this machine if None.
        finished: receives what is measured so far, when a part ends.

    Raises:
        ArgumentError: there is no such part.
        FitError: no document has `length` tokens, or nothing is pruned in so few.
    """
    chosen = tuple(parts) or tuple(PARTS)
    for part in chosen:
        if part not in PARTS:
            expected = f"one of {', '.join(PARTS)}"
            raise ArgumentError("parts", expected, repr(part), did_you_mean(part, PARTS))
    dense = dense or faster_dense(loaded, config)
    own = everything(config) if dense == "hip" else None
    references: dict[str, Reference] | None = {} if "meter" in chosen else None
    given = _Inputs(loaded, config, documents, length, own, references)
    facts = {
        **provenance("wall").to_dict(),
        "configuration": _described(config),
        "texts": _names(documents),
        "dense attention": DENSE_KERNELS[dense],
    }
    made = LabReport(loaded.name, length, config.to_dict(), facts, {}, {})
    for i, part in enumerate(chosen, start=1):
        name = f"{part}, {i} of {len(chosen)}"
        say = _named(progress, name)
        say("texts")
        with measured() as made.seconds[part]:
            made.results[part] = PARTS[part](given, say)
        _named(note, name)(f"took {made.seconds[part]}")
        if finished:
            finished(made)
    return made


def _names(documents: Sequence[Document]) -> str:
    """The names of the texts, of many the first ones."""
    names = [document.name for document in documents]
    more = [f"{len(names) - MANY} more"] if len(names) > MANY else []
    return ", ".join(names[:MANY] + more)


def _described(config: HiPConfig) -> str:
    """What differs from the defaults."""
    defaults = DEFAULT.to_dict()
    own = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    return ", ".join(f"{name} = {value}" for name, value in own.items()) or "default"


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What parts measure.

    Attributes:
        dense: the configuration of dense attention; None for SDPA.
        references: dense passes that a later part needs too, by text; None if none does.
    """

    loaded: LoadedModel
    config: HiPConfig
    documents: Sequence[Document]
    length: int
    dense: HiPConfig | None
    references: dict[str, Reference] | None

    def samples(self, length: int) -> list[Sample]:
        return cut_samples(self.loaded, self.documents, min(length, self.length), 1)


def _quality(given: _Inputs, say: Say) -> FidelityReport:
    return evaluate_fidelity(
        given.loaded,
        {"dense": given.dense, "hip": given.config},
        given.documents[:QUALITY_DOCUMENTS],
        length=given.length,
        floor_documents=FLOOR_DOCUMENTS,
        progress=lambda document, name: say(f"{document}, {name}"),
    )


def _answers(given: _Inputs, say: Say) -> RetrievalReport:
    return evaluate_retrieval(
        given.loaded,
        {"dense": given.dense, "hip": given.config, BLIND: blind(given.config)},
        TASKS,
        "\n\n".join(document.text for document in given.documents),
        length=given.length,
        samples=TASK_DOCUMENTS,
        questions=TASK_QUESTIONS,
        progress=lambda task, name, i: say(f"{task} {i} of {TASK_DOCUMENTS}, {name}"),
    )


def _drift(given: _Inputs, say: Say) -> DriftReport:
    return evaluate_drift(
        given.loaded,
        given.config,
        DRIFT_PROMPTS,
        given.documents,
        lengths=[min(DRIFT_LENGTH, given.length)],
        dense=given.dense,
        progress=lambda prompt, name: say(f"{prompt} of {len(DRIFT_PROMPTS)}, {name}"),
    )


def _cache(given: _Inputs, say: Say) -> CacheReport:
    samples = given.samples(given.length)
    return measure_cache(given.loaded, given.config, samples, progress=say)


def _representative(given: _Inputs, say: Say) -> RepresentativeReport:
    samples = given.samples(HEADS_LENGTH)
    return measure_representatives(
        given.loaded, given.config, samples, references=given.references, progress=say
    )


def _locality(given: _Inputs, say: Say) -> LocalityReport:
    config = given.config.replace(budget=min(LOSS_BUDGET, given.config.budget))
    samples = given.samples(LOSS_LENGTH)
    return measure_locality(given.loaded, config, samples, limit=LOSS_HEADS, progress=say)


def _meter(given: _Inputs, say: Say) -> MeterReport:
    samples = given.samples(HEADS_LENGTH)
    return measure_meter(
        given.loaded, given.config, samples, references=given.references, progress=say
    )


PARTS: dict[str, Callable[[_Inputs, Say], Result]] = {
    "quality": _quality,
    "answers": _answers,
    "drift": _drift,
    "cache": _cache,
    "representative": _representative,
    "locality": _locality,
    "meter": _meter,
}


def _named(progress: Say | None, part: str) -> Say:
    return lambda what: progress(f"{part}: {what}") if progress else None
