"""Splits, correlation and recall of every head on texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.lab.intervals import Estimate, estimate, mean
from hipserve.lab.meter import first_metered
from hipserve.lab.quality.beside import Reference, read_reference
from hipserve.lab.recorder import ROWS, LayerRecord, Reader, record_heads
from hipserve.lab.representative.recall import search_recall
from hipserve.lab.representative.splits import (
    LAGS,
    SIZES,
    Shares,
    correlation,
    predict_shares,
    split_shares,
)
from hipserve.lab.samples import Sample, check_room
from hipserve.models import LoadedModel


@dataclass(frozen=True, slots=True)
class HeadPoint:
    """One KV head on one text, its query heads together.

    Attributes:
        sample, domain: the text.
        layer, head: which.
        correlation: of scores, by the distance of their keys.
        measured, predicted: by the size of a range and the representative, the share of ranges
            split right; predicted from the correlation alone.
        recall: by search, the share of the best blocks that it chooses.
    """

    sample: str
    domain: str
    layer: int
    head: int
    correlation: dict[int, float]
    measured: dict[int, Shares]
    predicted: dict[int, Shares]
    recall: Shares


@dataclass(frozen=True, slots=True)
class RepresentativeReport:
    """Representatives of ranges, measured and predicted.

    Attributes:
        rows: query rows of each text.
        sizes: keys of the ranges.
        samples: name and domain of each text.
        points: every measurement.
    """

    model: str
    length: int
    rows: int
    sizes: list[int]
    config: dict[str, Any]
    samples: dict[str, str]
    points: list[HeadPoint]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def share(self, size: int, representative: str, *, predicted: bool = False) -> Estimate:
        """The share of ranges split right, mean over heads, and then over texts."""
        kind = "predicted" if predicted else "measured"
        return self._over_samples(lambda point: getattr(point, kind)[size][representative])

    def recall(self, search: str) -> Estimate:
        """The share of the best blocks found, mean over heads, and then over texts."""
        return self._over_samples(lambda point: point.recall[search])

    def heads(self) -> Iterator[tuple[tuple[int, int], list[HeadPoint]]]:
        """Layer and number of each head, with its points."""
        for at in dict.fromkeys((point.layer, point.head) for point in self.points):
            yield at, [point for point in self.points if (point.layer, point.head) == at]

    def _over_samples(self, value: Callable[[HeadPoint], float]) -> Estimate:
        return estimate(
            [mean([value(p) for p in self.points if p.sample == name]) for name in self.samples]
        )


def measure_representatives(
    loaded: LoadedModel,
    config: HiPConfig,
    samples: Sequence[Sample],
    *,
    rows: int = ROWS,
    sizes: Sequence[int] = SIZES,
    references: dict[str, Reference] | None = None,
    progress: Callable[[str], None] | None = None,
) -> RepresentativeReport:
    """Reads each sample with dense attention; rows of its last quarter are judged.

    Splits and correlation are of the keys that all those rows may search; recall is of every row
    for itself.

    Args:
        references: receives what `measure_meter` needs of the same passes, by sample.
        progress: receives the name of each sample before it is read.

    Raises:
        FitError: the texts are too short for the largest range, or nothing would be pruned.
    """
    length = samples[0].ids.shape[1]
    end = check_room(length, config, max(sizes))
    positions = torch.linspace(length * 3 // 4, length - 1, rows).long().to(loaded.device)
    points = list[HeadPoint]()
    for sample in samples:
        if progress:
            progress(sample.name)
        reader = None if references is None else _keep(references, sample.name)
        for record in record_heads(loaded, sample.ids, positions, reader):
            recall = search_recall(record, positions, config)
            for head in range(record.num_kv_heads):
                scores = record.scores(head, config.num_sink_tokens, end).flatten(0, 1)
                own = {name: _of_head(found, head, record) for name, found in recall.items()}
                points.append(_point(sample, (record.layer, head), scores, sizes, own))
    return RepresentativeReport(
        model=loaded.name,
        length=length,
        rows=rows,
        sizes=list(sizes),
        config=config.to_dict(),
        samples={sample.name: sample.domain for sample in samples},
        points=points,
    )


def _keep(references: dict[str, Reference], name: str) -> Reader:
    def read(loaded: LoadedModel, ids: Tensor) -> None:
        references[name] = read_reference(loaded, ids, first_metered(ids))

    return read


def _of_head(found: Tensor, head: int, record: LayerRecord) -> float:
    """The mean for one KV head of `[heads]`, which are KV heads or query heads."""
    return float(found.unflatten(0, (record.num_kv_heads, -1))[head].mean())


def _point(
    sample: Sample, at: tuple[int, int], scores: Tensor, sizes: Sequence[int], recall: Shares
) -> HeadPoint:
    rho = correlation(scores, max(*sizes, max(LAGS) + 1))
    return HeadPoint(
        sample.name,
        sample.domain,
        *at,
        correlation={lag: float(rho[lag]) for lag in LAGS},
        measured={size: split_shares(scores, size) for size in sizes},
        predicted={size: predict_shares(rho, size) for size in sizes},
        recall=recall,
    )
