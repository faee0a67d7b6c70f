"""How much less likely does pruned attention find real text? Every token, dense and pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, FitError
from hipserve.lab.intervals import Interval, bootstrap, mean
from hipserve.lab.quality.passes import check_length, prefill
from hipserve.lab.text import Document
from hipserve.models import LoadedModel
from hipserve.models.passes import make_cache

PIECE = 1024
"""Tokens of a piece: what the bootstrap resamples, as neighbouring tokens are not independent."""


@dataclass(frozen=True, slots=True)
class Nll:
    """Negative log-likelihood per token under one attention.

    Attributes:
        mean: nats, mean over domains of the mean over their tokens.
        by_domain: nats.
        change: mean relative to dense minus 1; 0 for dense itself.
        interval: 95 % paired bootstrap interval of `change`; None from too few pieces.
        pieces: how many pieces of `PIECE` tokens were compared.
    """

    mean: float
    by_domain: dict[str, float]
    change: float
    interval: Interval | None
    pieces: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """Tokens at positions [first, length) of every document, under each configuration."""

    model: str
    first: int
    length: int
    documents: list[str]
    too_short: list[str]
    configs: dict[str, dict[str, Any]]
    results: dict[str, Nll]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_perplexity(
    loaded: LoadedModel,
    configs: dict[str, HiPConfig | None],
    documents: Sequence[Document],
    *,
    length: int,
    first: int | None = None,
    progress: Callable[[str, str], None] | None = None,
) -> PerplexityReport:
    """Teacher-forced likelihood of the first `length` tokens of each document, prefill sparse.

    Args:
        configs: by name; None is dense attention. The first one is what others are compared to.
        documents: those with fewer than `length` tokens are left out and listed in the report.
        length: tokens read of each document.
        first: position of the first token that counts; a quarter of `length` if None.
        progress: receives document and configuration before each pass.

    Raises:
        ArgumentError: `length` or `first` leaves nothing to measure.
        FitError: `length` exceeds the context, or no document is long enough.
    """
    if length < 2:
        raise ArgumentError("length", "2 tokens or more", str(length))
    check_length(loaded, length)
    first = length // 4 if first is None else first
    if not 0 < first < length:
        raise ArgumentError("first", f"a position from 1 to {length - 1}", str(first))
    encoded = {doc: _encode(loaded, doc, length) for doc in documents}
    kept = {doc: ids for doc, ids in encoded.items() if ids.shape[1] == length}
    if not kept:
        longest = max((ids.shape[1] for ids in encoded.values()), default=0)
        raise FitError(
            f"nothing to measure at positions {first:,} to {length:,}: the longest document has "
            f"{longest:,} tokens",
            "lower the length or give longer texts",
        )
    pieces: dict[str, dict[str, list[float]]] = {}
    for name, config in configs.items():
        loaded.use(config)
        pieces[name] = {}
        for doc, ids in kept.items():
            if progress:
                progress(doc.name, name)
            nll = token_nll(loaded, ids, first)
            means = [float(piece.mean()) for piece in nll.split(PIECE)]
            pieces[name].setdefault(doc.domain, []).extend(means)
    return PerplexityReport(
        model=loaded.name,
        first=first,
        length=length,
        documents=[doc.name for doc in kept],
        too_short=[doc.name for doc in documents if doc not in kept],
        configs={name: config.to_dict() if config else {} for name, config in configs.items()},
        results={name: _compare(pieces[next(iter(configs))], pieces[name]) for name in configs},
    )


@torch.no_grad()
def token_nll(loaded: LoadedModel, ids: Tensor, first: int = 1) -> Tensor:
    """`[tokens - first]` float32 nats: of each token of `ids` `[1, tokens]` from `first` on."""
    parts: list[Tensor] = []
    for start, logits in prefill(loaded, ids, make_cache(loaded), first - 1):
        targets = ids[0, start + 1 : start + 1 + logits.shape[1]]
        parts.append(F.cross_entropy(logits[0, : len(targets)].float(), targets, reduction="none"))
    return torch.cat(parts).cpu()


def _encode(loaded: LoadedModel, document: Document, length: int) -> Tensor:
    options = {"return_tensors": "pt", "truncation": True, "max_length": length}
    return loaded.tokenizer(document.text, **options)["input_ids"].to(loaded.device)


def _compare(base: dict[str, list[float]], other: dict[str, list[float]]) -> Nll:
    by_domain = {domain: mean(values) for domain, values in other.items()}
    pairs = [
        (domain, a, b) for domain in base for a, b in zip(base[domain], other[domain], strict=True)
    ]
    change = mean(list(by_domain.values())) / mean([mean(v) for v in base.values()]) - 1
    interval = bootstrap(pairs, _change)
    return Nll(mean(list(by_domain.values())), by_domain, change, interval, len(pairs))


def _change(pairs: Sequence[tuple[str, float, float]]) -> float:
    domains: dict[str, list[tuple[float, float]]] = {}
    for domain, a, b in pairs:
        domains.setdefault(domain, []).append((a, b))
    base = mean([mean([a for a, _ in rows]) for rows in domains.values()])
    return mean([mean([b for _, b in rows]) for rows in domains.values()]) / base - 1
