"""The same question at several depths of texts of several lengths: where are answers lost?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.lab.intervals import Interval, estimate_flips
from hipserve.lab.quality.controls import BLIND, not_caught
from hipserve.lab.quality.retrieval import LOW, Form, TaskResult, evaluate_retrieval
from hipserve.lab.quality.tasks import check_depth
from hipserve.lab.verdicts import MARGINS, Verdict, judge
from hipserve.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Cell:
    """One depth at one length.

    Attributes:
        depth: of what is asked for; 0 is the beginning of the text.
    """

    length: int
    depth: float
    result: TaskResult


@dataclass(frozen=True, slots=True)
class Overall:
    """All cells together: mean change of the score, its 95 % interval and the verdict."""

    change: float
    interval: Interval | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class DepthReport:
    """A task by length and depth; `overall` by configuration."""

    model: str
    task: str
    form: Form
    configs: dict[str, dict[str, Any]]
    cells: list[Cell]
    overall: dict[str, Overall]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_depths(
    loaded: LoadedModel,
    configs: dict[str, HiPConfig | None],
    task: str,
    text: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    form: Form | None = None,
    seed: int = 0,
    margin: float = MARGINS["answers"],
    progress: Callable[[str, str, int], None] | None = None,
) -> DepthReport:
    """Scores one question a document, with what it asks for at every depth of every length.

    Args:
        configs: by name; the first one is what others are compared with. The controls of
            `evaluate_fidelity` are added.
        task: one whose first question is answered at one place: `quote` for passages.
        lengths: tokens of prompt and answer.
        depths: from 0 (beginning) to 1.
        samples: documents of each cell.
        form, seed, margin, progress: as `evaluate_retrieval` takes them.

    Raises:
        ArgumentError, FitError: as `evaluate_retrieval`, or a depth that the task has not.
    """
    if not (lengths and depths):
        raise ArgumentError("depths", "lengths and depths", "none")
    for depth in depths:
        check_depth(task, depth)
    places = [(length, depth) for length in lengths for depth in depths]
    reports = [
        evaluate_retrieval(
            loaded,
            configs,
            [task],
            text,
            length=length,
            samples=samples,
            form=form,
            seed=seed,
            margin=margin,
            controls=True,
            depth=depth,
            progress=progress,
        )
        for length, depth in places
    ]
    cells = [Cell(*place, report.results[0]) for place, report in zip(places, reports, strict=True)]
    overall = {name: _overall(cells, name, margin) for name in cells[0].result.flips}
    return DepthReport(
        model=loaded.name,
        task=task,
        form=reports[0].form,
        configs=reports[0].configs,
        cells=cells,
        overall=overall,
        warnings=_warnings(cells, overall, next(iter(configs))),
    )


def _signs(cells: Sequence[Cell], name: str) -> Iterator[list[int]]:
    """For each document, its answer lost (-1), gained (1) or as before."""
    for cell in cells:
        flips = cell.result.flips[name]
        kept = cell.result.samples - flips.lost - flips.gained
        yield from ([sign] for sign in [-1] * flips.lost + [1] * flips.gained + [0] * kept)


def _overall(cells: Sequence[Cell], name: str, margin: float) -> Overall:
    measured = estimate_flips(list(_signs(cells, name)))
    return Overall(measured.value, measured.interval(), judge(measured, margin))


def _warnings(cells: Sequence[Cell], overall: dict[str, Overall], reference: str) -> list[str]:
    low = [c for c in cells if c.result.scores[reference].mean < LOW]
    found: list[str] = []
    if low:
        where = ", ".join(f"{c.length:,} tokens at {c.depth:.0%}" for c in low)
        found.append(f"{reference} itself is right in less than half, so losses hide: {where}")
    for name, row in overall.items():
        if name == BLIND and row.verdict.decision != "different":
            found.append(not_caught(name))
        if row.interval is not None and row.interval[0] > 0:
            found.append(
                f"{name}: more right answers than {reference} beyond noise; look for a fault "
                "of the measurement"
            )
    return found
