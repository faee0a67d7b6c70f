"""Budgets of every layer and KV head, found on some documents and judged on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hipserve.config import HiPConfig
from hipserve.errors import FitError
from hipserve.lab.budgets.allocate import allocate
from hipserve.lab.budgets.measure import BLOCKS, layer_errors, sampled_blocks
from hipserve.lab.calibration.candidates import halves, label
from hipserve.lab.intervals import Estimate, estimate, mean
from hipserve.lab.quality.passes import check_length, encode_documents
from hipserve.lab.text import Document
from hipserve.models import LoadedModel

UNIT = 8
"""Factors are multiples of 1 / UNIT; the smallest one keeps a head from starving on other texts."""

FACTORS = tuple(n / UNIT for n in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64))
"""Factors of the budget that are measured, as far as `rerank` allows them."""


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """One KV head on one document, its query heads together.

    Attributes:
        document, domain: the text, as `name sha256:digits`.
        layer, head: which.
        errors: with each of the report's factors; see `layer_errors`.
    """

    document: str
    domain: str
    layer: int
    head: int
    errors: list[float]


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A budget for every layer and KV head, and what it leaves of the error.

    Attributes:
        query_blocks: of each document that were measured.
        factors: of the budget that were measured.
        choose, report: documents that the budgets were found on, and those that judge them.
        config: with `budget_factors` as found; their mean over all heads that are pruned is at
            most 1.
        points: every measurement.
    """

    model: str
    length: int
    query_blocks: int
    factors: list[float]
    choose: list[str]
    report: list[str]
    config: HiPConfig
    points: list[BudgetPoint]

    def to_dict(self) -> dict[str, Any]:
        left = {"constant": asdict(self.left()), "fitted": asdict(self.left(fitted=True))}
        return {**asdict(self), "config": self.config.to_dict(), "left": left}

    @property
    def layers(self) -> list[int]:
        """Those that are pruned."""
        return list(dict.fromkeys(point.layer for point in self.points))

    def keys(self, layer: int) -> list[int]:
        """The budget of each KV head."""
        own = self.config.budget_factors[layer]
        return [round(factor * self.config.budget) for factor in own]

    @property
    def mean_keys(self) -> float:
        """Budget of a KV head, mean over those that are pruned."""
        return mean([keys for layer in self.layers for keys in self.keys(layer)])

    def left(self, layer: int | None = None, *, fitted: bool = False) -> Estimate:
        """Error of a layer, or mean over layers: with the constant budget or the fitted ones.

        As a share of the square of the dense output, over the documents that did not choose.
        """
        layers = self.layers if layer is None else [layer]
        return estimate(
            [
                sum(self._error(p, fitted) for p in self.points if self._of(p, name, layers))
                / len(layers)
                for name in self.report
            ]
        )

    def _of(self, point: BudgetPoint, name: str, layers: Sequence[int]) -> bool:
        return point.document == name and point.layer in layers

    def _error(self, point: BudgetPoint, fitted: bool) -> float:
        own = self.config.budget_factors[point.layer][point.head] if fitted else 1.0
        return point.errors[self.factors.index(own)]


def measured_factors(config: HiPConfig) -> list[float]:
    """Those of `FACTORS` that are whole numbers of key blocks, up to `rerank`."""
    blocks = config.budget // config.key_block_size
    return [x for x in FACTORS if (x * blocks).is_integer() and x <= max(config.rerank, 1)]


def find_budgets(
    loaded: LoadedModel,
    config: HiPConfig,
    documents: Sequence[Document],
    *,
    length: int,
    count: int = 4,
    blocks: int = BLOCKS,
    progress: Callable[[str], None] | None = None,
) -> BudgetReport:
    """A budget for each layer and KV head whose mean is `config.budget`.

    Half of the documents choose: the error of layers, added up over all of them, is the minimum
    that this mean allows. The other half reports.

    Args:
        config: of the search; its own factors are left out.
        documents: those with fewer than `length` tokens are left out.
        length: tokens of each document.
        count: of the documents that are long enough, so many are read, spread over all.
        blocks: query blocks of each document that are measured.
        progress: receives the name of each document before it is read.

    Raises:
        ConfigError: a search that ranks no keys, so heads cannot have budgets of their own.
        FitError: `length` exceeds the context, fewer than two documents are long enough, or nothing
            would be pruned.
    """
    config = config.replace(budget_factors=[])
    config.replace(budget_factors=[[1.0]])  # refused where the search ranks no keys
    check_length(loaded, length)
    measured = len(sampled_blocks(config, length, loaded.device.type, blocks))
    encoded = encode_documents(loaded, documents, length)
    long, count = list(encoded), min(count, len(encoded))
    if count < 2:
        raise FitError(
            f"one document of {length:,} tokens or more: some are needed to choose by and some to "
            "report on",
            "give more documents, or a shorter length",
        )
    read = [long[i * (len(long) - 1) // (count - 1)] for i in range(count)]
    factors = measured_factors(config)
    points = list[BudgetPoint]()
    for doc in read:
        if progress:
            progress(doc.name)
        found = layer_errors(loaded, encoded[doc], config, factors, blocks=blocks)
        points += [
            BudgetPoint(label(doc), doc.domain, layer, head, own)
            for layer, errors in found.items()
            for head, own in enumerate(errors.tolist())
        ]
    choose, report = ([label(doc) for doc in half] for half in halves(read))
    lists = _fit([p for p in points if p.document in choose], factors)
    layers = loaded.model.config.get_text_config().num_hidden_layers
    return BudgetReport(
        model=loaded.name,
        length=length,
        query_blocks=measured,
        factors=factors,
        choose=choose,
        report=report,
        config=config.replace(budget_factors=[lists.get(layer, []) for layer in range(layers)]),
        points=points,
    )


def _fit(points: Sequence[BudgetPoint], factors: Sequence[float]) -> dict[int, list[float]]:
    """By layer, the factor of each KV head, from the points of the documents that choose."""
    heads = list(dict.fromkeys((point.layer, point.head) for point in points))
    errors = dict.fromkeys(heads, torch.zeros(len(factors), dtype=torch.float64))
    for point in points:
        at = point.layer, point.head
        errors[at] = errors[at] + torch.tensor(point.errors, dtype=torch.float64)
    costs = [round(factor * UNIT) for factor in factors]
    chosen = allocate(torch.stack(list(errors.values())), costs, UNIT * len(heads))
    found: dict[int, list[float]] = {}
    for (layer, _), option in zip(heads, chosen, strict=True):
        found.setdefault(layer, []).append(factors[option])
    return found
