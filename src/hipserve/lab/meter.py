"""The meter beside the truth: how near its estimates are, and whether they predict a loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hipserve.attention.meter import Attended, Meter, MeteredRows
from hipserve.config import HiPConfig
from hipserve.errors import FitError
from hipserve.integrations.transformers import HiPCache
from hipserve.lab.intervals import Estimate, estimate, mean
from hipserve.lab.quality.beside import Reference, read_beside, read_reference
from hipserve.lab.samples import Sample
from hipserve.lab.shown import Chart, Grid, Line, counted, with_error
from hipserve.models import LoadedModel
from hipserve.models.passes import make_cache

EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Edges of the bins of the calibration curve: shares of attention."""


@dataclass(frozen=True, slots=True)
class LayerPoint:
    """One layer on one text.

    Attributes:
        layer: its number; None for the mean of all layers, row by row.
        estimated, unread: share of attention that a row and head leaves unread, mean over both: by
            the meter, and by all keys.
        error: mean absolute difference of the two, of a row and head.
        rank: Spearman's correlation of the two over rows and heads.
        loss_rank, unread_loss_rank: Spearman's correlation over rows of the estimate, and of the
            truth, mean over heads, with KL to dense attention at the same positions.
    """

    sample: str
    layer: int | None
    estimated: float
    unread: float
    error: float
    rank: float
    loss_rank: float
    unread_loss_rank: float


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows and heads of one text whose estimates lie between two `EDGES`.

    Attributes:
        low: the lower edge.
        shares: how many rows times heads.
        estimated, unread: their means.
    """

    sample: str
    low: float
    shares: int
    estimated: float
    unread: float


@dataclass(frozen=True, slots=True)
class MeterReport:
    """The meter of every layer compared with the truth.

    Attributes:
        rows: metered rows of each text.
        samples: name and domain of each text.
        points: by text and layer.
        bins: by text.
    """

    model: str
    length: int
    rows: int
    config: dict[str, Any]
    samples: dict[str, str]
    points: list[LayerPoint]
    bins: list[Bin]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def of_layer(self, layer: int | None, measure: Callable[[LayerPoint], float]) -> Estimate:
        """Mean over texts."""
        return estimate([measure(point) for point in self.points if point.layer == layer])


class Truth(Meter):
    """Meters the same row of every query block in every layer, and all of its keys.

    Attributes:
        positions, estimated, unread: `[rows]` int64 and `[rows, num_q_heads]` float32, in parts.
    """

    def __init__(self, layer: int) -> None:
        super().__init__(layer)
        self.positions, self.estimated, self.unread = [], list[Tensor](), list[Tensor]()

    def place(self, position: int, count: int, size: int) -> int | None:  # noqa: ARG002
        return count // 2

    def add(self, share: Tensor, rows: MeteredRows) -> None:
        """As `Meter.add`: share `[n, num_q_heads]`."""
        self.positions.append(rows.position)
        self.estimated.append(share)

    def measure(self, call: Attended) -> None:
        super().measure(call)
        rows = self.choose(call.layout, call.rule)
        if rows is not None:
            self.unread.append(exact_share(call, rows))


def exact_share(call: Attended, rows: MeteredRows) -> Tensor:
    """`[n, num_q_heads]`: what rows of a single sequence leave unread, by all keys."""
    device, heads = call.q.device, call.pool.num_kv_heads
    row, position = rows.row.to(device), rows.position.to(device)
    at = torch.arange(int(rows.position.max()) + 1, device=device)
    keys = call.keys_at(row[:1] * 0, at.expand(1, heads, -1), torch.arange(heads, device=device))
    own = call.q[row].unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [heads, group, n, head_dim]
    scores = call.scores(own, keys[0][:, None]).masked_fill(at > position[:, None], -torch.inf)
    everything = scores.logsumexp(-1).flatten(0, 1).T
    return (-torch.expm1(call.lse[row] - everything)).clamp(min=0)


def measure_meter(
    loaded: LoadedModel,
    config: HiPConfig,
    samples: Sequence[Sample],
    *,
    references: Mapping[str, Reference] | None = None,
    progress: Callable[[str], None] | None = None,
) -> MeterReport:
    """Reads each sample with dense attention, then pruned and metered.

    A row of each query block in the last three quarters of a text is compared.

    Args:
        references: dense passes from `first_metered` on that were made before, by sample.
        progress: receives what is measured before each pass.

    Raises:
        FitError: nothing is pruned there.
    """
    say = progress or _say_nothing
    pruned = config.replace(dense_below=0, decode_dense_below=0, dense_layers=())
    points, bins, rows = list[LayerPoint](), list[Bin](), 0
    for sample in samples:
        first = first_metered(sample.ids)
        reference = (references or {}).get(sample.name)
        if reference is None:
            say(f"{sample.name} (dense)")
            loaded.use(None)
            reference = read_reference(loaded, sample.ids, first)
        say(f"{sample.name} (pruned and metered)")
        loaded.use(pruned)
        cache = make_cache(loaded)
        meters = _metered(cache) if isinstance(cache, HiPCache) else {}
        kl = read_beside(loaded, sample.ids, first, reference, cache=cache).kl
        layers = {
            layer: found
            for layer, meter in meters.items()
            if (found := _compared(meter, first, kl))
        }
        if not layers:
            raise FitError(
                f"nothing is pruned in {sample.ids.shape[1]:,} tokens of {sample.name}",
                "give a longer --length or a smaller --budget",
            )
        points += _points(sample.name, layers)
        bins += _bins(sample.name, layers)
        rows = len(next(iter(layers.values())).kl)
    return MeterReport(
        model=loaded.name,
        length=samples[0].ids.shape[1],
        rows=rows,
        config=pruned.to_dict(),
        samples={sample.name: sample.domain for sample in samples},
        points=points,
        bins=bins,
    )


def first_metered(ids: Tensor) -> int:
    """The first of the positions of `ids` `[1, tokens]` that are compared."""
    return ids.shape[1] // 4


def _say_nothing(what: str) -> None: ...


def _metered(cache: HiPCache) -> dict[int, Truth]:
    meters = {i: Truth(i) for i, layer in enumerate(cache.layers) if layer in cache.paged_layers}
    for layer, meter in zip(cache.paged_layers, meters.values(), strict=True):
        layer.meter = meter
    return meters


@dataclass(frozen=True, slots=True)
class _Compared:
    """Rows of one layer: `[rows, num_q_heads]` float32 each, and `[rows]` KL of their positions."""

    estimated: Tensor
    unread: Tensor
    kl: Tensor


def _compared(meter: Truth, first: int, kl: Tensor) -> _Compared | None:
    """The rows whose next token counts; token i of `kl` is at position `first` + i."""
    if not meter.positions:
        return None
    token = torch.cat(meter.positions) + 1 - first
    counts = (token >= 0) & (token < len(kl))
    if not counts.any():
        return None
    estimated, unread = (torch.cat(x).float().cpu() for x in (meter.estimated, meter.unread))
    return _Compared(estimated[counts], unread[counts], kl[token[counts]])


def _points(sample: str, layers: dict[int, _Compared]) -> Iterator[LayerPoint]:
    """A point of each layer, and of the mean of all."""
    parts = list(layers.values())
    estimated = torch.stack([rows.estimated for rows in parts]).mean(0)
    unread = torch.stack([rows.unread for rows in parts]).mean(0)
    for layer, rows in [(None, _Compared(estimated, unread, parts[0].kl)), *layers.items()]:
        yield LayerPoint(
            sample,
            layer,
            estimated=float(rows.estimated.mean()),
            unread=float(rows.unread.mean()),
            error=float((rows.estimated - rows.unread).abs().mean()),
            rank=spearman(rows.estimated.flatten(), rows.unread.flatten()),
            loss_rank=spearman(rows.estimated.mean(1), rows.kl),
            unread_loss_rank=spearman(rows.unread.mean(1), rows.kl),
        )


def _bins(sample: str, layers: dict[int, _Compared]) -> Iterator[Bin]:
    estimated = torch.cat([rows.estimated.flatten() for rows in layers.values()])
    unread = torch.cat([rows.unread.flatten() for rows in layers.values()])
    for low, high in itertools.pairwise(EDGES):
        inside = (estimated >= low) & (estimated < high)
        if inside.any():
            of_meter, of_keys = (float(x[inside].mean()) for x in (estimated, unread))
            yield Bin(sample, low, int(inside.sum()), of_meter, of_keys)


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's correlation of `[n]` and `[n]`, without ties; 0 where one does not vary."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (x, y)])
    return (
        float(torch.corrcoef(ranks)[0, 1]) if x.unique().numel() > 1 < y.unique().numel() else 0.0
    )


def grids(report: MeterReport) -> list[Grid]:
    """By layer, and the calibration curve."""
    return [_layers(report), _calibration(report)]


def sentences(report: MeterReport) -> list[str]:
    """What the rows say about loss."""
    found = report.of_layer(None, lambda point: point.loss_rank)
    interval = found.interval()
    if interval is None:
        return ["too few texts to say whether unread attention predicts the loss of a position"]
    low, high = interval
    verdict = "predicts" if low > 0 else "is not shown to predict"
    return [
        f"unread attention {verdict} where pruning loses: rank correlation with KL, position by "
        f"position, {found.value:+.2f} (95 % interval over texts {low:+.2f} to {high:+.2f})"
    ]


def _layers(report: MeterReport) -> Grid:
    def cell(layer: int | None, form: str, measure: Callable[[LayerPoint], float]) -> str:
        return with_error(report.of_layer(layer, measure), form)

    rows = [
        [
            "mean of all" if layer is None else str(layer),
            cell(layer, ".3f", lambda p: p.unread),
            cell(layer, ".3f", lambda p: p.estimated),
            cell(layer, ".3f", lambda p: p.error),
            cell(layer, "+.2f", lambda p: p.rank),
            cell(layer, "+.2f", lambda p: p.loss_rank),
            cell(layer, "+.2f", lambda p: p.unread_loss_rank),
        ]
        for layer in dict.fromkeys(point.layer for point in report.points)
    ]
    headings = ["layer", "unread", "metered", "error", "rank", "KL by meter", "KL by truth"]
    caption = (
        f"{counted(len(report.samples), 'text')} of {report.length:,} tokens, "
        f"{counted(report.rows, 'row')} each; error: "
        "of a row and head; rank: correlation of metered and unread; KL: rank correlation with KL "
        "to dense attention, position by position; all means over texts"
    )
    return Grid(f"{report.model}: attention that rows leave unread", headings, rows, caption)


def _calibration(report: MeterReport) -> Grid:
    rows: list[list[str]] = []
    for low, high in itertools.pairwise(EDGES):
        found = [point for point in report.bins if point.low == low]
        if found:
            metered = estimate([point.estimated for point in found])
            unread = estimate([point.unread for point in found])
            shares = sum(point.shares for point in found)
            cells = [f"{shares:,}", with_error(metered), with_error(unread)]
            rows.append([f"{low:g} to {high:g}", *cells])
    caption = "Rows and heads of all layers by what the meter says; means over texts"
    return Grid("Calibration", ["meter says", "rows x heads", "metered", "unread"], rows, caption)


MEASURES: dict[str, Callable[[LayerPoint], float]] = {
    "unread": lambda point: point.unread,
    "metered": lambda point: point.estimated,
}


def charts(report: MeterReport) -> list[Chart]:
    """The calibration curve, and layers."""
    bins = [[point for point in report.bins if point.low == low] for low in EDGES[:-1]]
    kept = [found for found in bins if found]
    x = [mean([point.estimated for point in found]) for found in kept]
    curve = Line("metered", x, [mean([point.unread for point in found]) for found in kept])
    layers = sorted({point.layer for point in report.points if point.layer is not None})
    by_layer = [
        Line(name, layers, [report.of_layer(layer, measure).value for layer in layers])
        for name, measure in MEASURES.items()
    ]
    return [
        Chart("calibration", "metered", "unread", [curve, Line("equal", x, x)]),
        Chart("by layer", "layer", "share of attention", by_layer),
    ]
