"""Locality of every head on texts of several domains, and what pruning the head costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.lab.intervals import Estimate, estimate, mean
from hipserve.lab.locality.clusters import intraclass, unread, waste
from hipserve.lab.locality.loss import Head, head_losses
from hipserve.lab.locality.ranks import RankCorrelation, rank_correlation
from hipserve.lab.recorder import ROWS, LayerRecord, record_heads
from hipserve.lab.representative.splits import LAGS, SIZES, correlation
from hipserve.lab.samples import Sample, check_room
from hipserve.models import LoadedModel
from hipserve.plan import pruning_rule


@dataclass(frozen=True, slots=True)
class LocalityPoint:
    """One KV head on one text, its query heads together.

    Attributes:
        sample, domain: the text.
        layer, head: which.
        intraclass, waste: by the size of a block, of the scores of searched keys.
        correlation: of scores, by the distance of their keys.
        unread: the share of attention that the best blocks within the budget leave out.
        loss: nats per token, KL of pruning this head alone; None where it was not measured.
    """

    sample: str
    domain: str
    layer: int
    head: int
    intraclass: dict[int, float]
    waste: dict[int, float]
    correlation: dict[int, float]
    unread: float
    loss: float | None = None


Measure = Callable[[LocalityPoint], float]
PREDICTORS: dict[str, Measure] = {
    "intraclass, 16 keys": lambda point: point.intraclass[16],
    "intraclass, 64 keys": lambda point: point.intraclass[64],
    "waste, 16 keys": lambda point: point.waste[16],
    "waste, 64 keys": lambda point: point.waste[64],
    "correlation, 16 keys apart": lambda point: point.correlation[16],
    "unread attention": lambda point: point.unread,
}


@dataclass(frozen=True, slots=True)
class LocalityReport:
    """Locality and loss of every head.

    Attributes:
        rows: query rows of each text.
        samples: name and domain of each text.
        points: every measurement.
        predictions: rank correlation of each measure with the loss of pruning a head, over heads.
    """

    model: str
    length: int
    rows: int
    config: dict[str, Any]
    samples: dict[str, str]
    points: list[LocalityPoint]
    predictions: dict[str, RankCorrelation]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def of_domain(self, domain: str, measure: Measure) -> Estimate:
        """Mean over heads, and then over the texts of a domain."""
        names = [name for name, own in self.samples.items() if own == domain]
        return estimate(
            [mean([measure(p) for p in self.points if p.sample == name]) for name in names]
        )

    def heads(self) -> Iterator[tuple[Head, list[LocalityPoint]]]:
        """Layer and number of each head, with its points."""
        return _by_head(self.points)


def _by_head(points: Sequence[LocalityPoint]) -> Iterator[tuple[Head, list[LocalityPoint]]]:
    for at in dict.fromkeys((point.layer, point.head) for point in points):
        yield at, [point for point in points if (point.layer, point.head) == at]


def measure_locality(
    loaded: LoadedModel,
    config: HiPConfig,
    samples: Sequence[Sample],
    *,
    rows: int = ROWS,
    losses: int = 1,
    limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> LocalityReport:
    """Reads each sample with dense attention; rows of its last quarter are judged.

    Args:
        config: what is pruned where a single head is, and the budget of `unread`.
        losses: how many of the samples to read again with each head pruned, one pass each.
        limit: heads to prune, spread evenly over all of them; all if None.
        progress: receives what is measured before each pass.

    Raises:
        FitError: the texts are too short for blocks of 256 keys, or nothing would be pruned.
    """
    length = samples[0].ids.shape[1]
    check_room(length, config, max(SIZES))
    pruned = config.replace(dense_below=0, decode_dense_below=0, dense_layers=())
    positions = torch.linspace(length * 3 // 4, length - 1, rows).long().to(loaded.device)
    points = list[LocalityPoint]()
    for i, sample in enumerate(samples):
        say = _named(progress, sample.name)
        say("dense")
        records = record_heads(loaded, sample.ids, positions)
        own = [
            _point(sample, r, h, positions, pruned) for r in records for h in range(r.num_kv_heads)
        ]
        del records
        if i < losses:
            heads = _spread([(point.layer, point.head) for point in own], limit)
            lost = head_losses(loaded, sample.ids, heads, pruned, say)
            own = [replace(point, loss=lost.get((point.layer, point.head))) for point in own]
        points += own
    return LocalityReport(
        model=loaded.name,
        length=length,
        rows=rows,
        config=pruned.to_dict(),
        samples={sample.name: sample.domain for sample in samples},
        points=points,
        predictions=_predict(points) if losses else {},
    )


def _spread(heads: list[Head], limit: int | None) -> list[Head]:
    """At most `limit` of them, the first and the last included."""
    count = min(limit or len(heads), len(heads))
    return [heads[int(i)] for i in torch.linspace(0, len(heads) - 1, count)]


def _named(progress: Callable[[str], None] | None, sample: str) -> Callable[[str], None]:
    return lambda what: progress(f"{sample} ({what})") if progress else None


def _point(
    sample: Sample, record: LayerRecord, head: int, positions: Tensor, config: HiPConfig
) -> LocalityPoint:
    length, begin = record.keys.shape[0], config.num_sink_tokens
    all_scores = record.scores(head, 0, length)
    group = all_scores.shape[1]
    hidden = torch.arange(length, device=positions.device) > positions[:, None, None]
    rule = pruning_rule(config, positions.device.type)
    ends = rule.window_start(positions, 1).repeat_interleave(group)
    left = unread(
        all_scores.masked_fill(hidden, -torch.inf).flatten(0, 1),
        ends.new_tensor(begin),
        ends,
        config.key_block_size,
        config.max_selected,
    )
    scores = all_scores[..., begin : check_room(length, config, max(SIZES))].flatten(0, 1)
    rho = correlation(scores, max(LAGS) + 1)
    return LocalityPoint(
        sample.name,
        sample.domain,
        record.layer,
        head,
        intraclass={size: intraclass(scores, size) for size in SIZES},
        waste={size: waste(scores, size) for size in SIZES},
        correlation={lag: float(rho[lag]) for lag in LAGS},
        unread=left,
    )


def _predict(points: Sequence[LocalityPoint]) -> dict[str, RankCorrelation]:
    """Over heads, each a mean over the texts whose losses were measured."""
    heads = [own for _, own in _by_head([point for point in points if point.loss is not None])]
    losses = [mean([point.loss or 0.0 for point in own]) for own in heads]
    return {
        name: rank_correlation([mean([measure(p) for p in own]) for own in heads], losses)
        for name, measure in PREDICTORS.items()
    }
