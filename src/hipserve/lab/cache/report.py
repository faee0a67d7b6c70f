"""Hit ratios of caches of blocks, simulated on traces of real decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.lab.cache.policies import POLICIES, simulate
from hipserve.lab.cache.trace import LayerTrace, record_trace
from hipserve.lab.intervals import Estimate, estimate
from hipserve.lab.samples import Sample
from hipserve.models import LoadedModel

CAPACITIES = (1, 2, 4, 8)
INTERVALS = (1, 8)


@dataclass(frozen=True, slots=True)
class CachePoint:
    """One layer of one sample under one cache, all heads together, the first step left out.

    Attributes:
        sample, domain: the text.
        layer: its number.
        policy: what decides which blocks go.
        capacity: of the cache of each head, in selections.
        interval: steps that share a selection.
        blocks, hits: that the steps read, and that were in the cache.
        mass, mass_hit: the attention that went to those blocks.
    """

    sample: str
    domain: str
    layer: int
    policy: str
    capacity: int
    interval: int
    blocks: int
    hits: int
    mass: float
    mass_hit: float


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Hit ratios on traces of decode steps.

    Attributes:
        steps: decode steps of each sample, the first of which only fills the cache.
        max_selected: blocks of a selection, mean over heads.
        keys: of the sequence in its last step; a share of them is what a cache holds.
        block_bytes: keys and values of one block of one KV head.
        samples: name and domain of each text.
        points: every measurement.
    """

    model: str
    length: int
    steps: int
    max_selected: int
    keys: int
    block_bytes: int
    config: dict[str, Any]
    samples: dict[str, str]
    points: list[CachePoint]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def values(self, field: str) -> list[Any]:
        """What a field of the points takes, in the order of measurement."""
        return list(dict.fromkeys(getattr(point, field) for point in self.points))

    def ratio(self, *, weighted: bool = False, **where: object) -> Estimate:
        """Share of blocks that were in the cache, mean over samples of the points with these
        fields; `weighted` by the attention that goes to them."""
        chosen = list(self._where(where))
        names = dict.fromkeys(point.sample for point in chosen)
        ratios = [_ratio([p for p in chosen if p.sample == name], weighted) for name in names]
        return estimate(ratios)

    def bytes_per_step(self, **where: object) -> float:
        """Keys and values that a step has to load for all layers and heads, mean over samples."""
        chosen = list(self._where(where))
        missed = sum(point.blocks - point.hits for point in chosen)
        return missed * self.block_bytes / (self.steps - 1) / len({p.sample for p in chosen})

    def share_of_keys(self, capacity: int) -> float:
        """The share of all keys of a head that a cache of this capacity holds."""
        size = self.config["key_block_size"]
        return min(capacity * self.max_selected * size / self.keys, 1.0)

    def _where(self, where: dict[str, object]) -> Iterator[CachePoint]:
        for point in self.points:
            if all(getattr(point, field) == value for field, value in where.items()):
                yield point


def _ratio(points: Sequence[CachePoint], weighted: bool) -> float:
    if weighted:
        return sum(p.mass_hit for p in points) / sum(p.mass for p in points)
    return sum(p.hits for p in points) / sum(p.blocks for p in points)


def measure_cache(
    loaded: LoadedModel,
    config: HiPConfig,
    samples: Sequence[Sample],
    *,
    steps: int = 64,
    capacities: Sequence[int] = CAPACITIES,
    intervals: Sequence[int] = INTERVALS,
    policies: Sequence[str] = tuple(POLICIES),
    progress: Callable[[str], None] | None = None,
) -> CacheReport:
    """Records the last `steps` tokens of each sample as decode steps; simulates caches on them.

    Every layer and head has a cache of its own, of `capacities` times the blocks of its own
    selection. Sinks and window are always there and not counted.

    Raises:
        ArgumentError: fewer than two steps, or steps that leave nothing to read before them.
        FitError: decode steps of this length are not pruned.
    """
    length = samples[0].ids.shape[1]
    if not 2 <= steps < length:
        raise ArgumentError("steps", f"a number from 2 to {length - 1:,}", str(steps))
    points, traces = list[CachePoint](), list[LayerTrace]()
    for sample in samples:
        if progress:
            progress(sample.name)
        traces = record_trace(loaded, sample.ids, steps, config)
        for trace in traces:
            for policy in policies:
                for interval in intervals:
                    points += [
                        _point(sample, trace, policy, capacity, interval) for capacity in capacities
                    ]
    return CacheReport(
        model=loaded.name,
        length=length,
        steps=steps,
        max_selected=config.max_selected,
        keys=traces[0].keys,
        block_bytes=2 * config.key_block_size * loaded.head_dim * loaded.model.dtype.itemsize,
        config=config.to_dict(),
        samples={sample.name: sample.domain for sample in samples},
        points=points,
    )


def _point(
    sample: Sample, trace: LayerTrace, policy: str, capacity: int, interval: int
) -> CachePoint:
    steps, heads, _ = trace.blocks.shape
    blocks = hits = 0
    mass = mass_hit = 0.0
    for head in range(heads):
        requests = [
            {b: m for b, m in zip(ids, shares, strict=True) if b >= 0}
            for ids, shares in zip(
                trace.blocks[:, head].tolist(), trace.mass[:, head].tolist(), strict=True
            )
        ]
        chosen = requests[::interval]  # between them nothing can be missing
        own = max(map(len, requests))  # heads have budgets of their own
        missed = simulate([list(request) for request in chosen], capacity * own, policy)
        held = [requests[step - step % interval] for step in range(1, steps)]
        blocks += sum(map(len, held))
        mass += sum(sum(request.values()) for request in held)
        later = list(zip(chosen, missed, strict=True))[1:]
        hits -= sum(len(missing) for _, missing in later)
        mass_hit -= sum(request[block] for request, missing in later for block in missing)
    return CachePoint(
        sample.name,
        sample.domain,
        trace.layer,
        policy,
        capacity=capacity,
        interval=interval,
        blocks=blocks,
        hits=blocks + hits,
        mass=mass,
        mass_hit=mass + mass_hit,
    )
