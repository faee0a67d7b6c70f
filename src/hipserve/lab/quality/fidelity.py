"""How far is pruned attention from dense attention on real text? Every token, one pass each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.lab.intervals import (
    MIN_VALUES,
    Estimate,
    Interval,
    estimate,
    estimate_change,
    mean,
)
from hipserve.lab.quality.beside import Reference, Tokens, read_beside, read_reference
from hipserve.lab.quality.controls import BLIND, CONTROLS, FLOOR, not_caught, with_controls
from hipserve.lab.quality.costs import Cost
from hipserve.lab.quality.far import far_tokens
from hipserve.lab.quality.passes import check_span, encode_documents
from hipserve.lab.text import Document
from hipserve.lab.verdicts import MARGINS, Decision, Verdict, check_margins, judge_all
from hipserve.models import LoadedModel
from hipserve.models.passes import make_cache

PIECE = 1024
"""Tokens of a piece, the unit of intervals where there are too few documents: neighbouring tokens
are not independent."""
FLOOR_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One attention compared with the reference, token by token.

    Attributes:
        mean: nats, mean over domains of the mean over their tokens of the negative log-likelihood.
        by_domain: nats.
        change: mean relative to that of the reference, minus 1.
        interval: 95 % interval of `change`; None from too few pieces.
        pieces: documents that intervals rest on, or pieces of `PIECE` tokens of too few documents.
        kl, kl_interval: nats per token, KL(reference || this), and its 95 % interval.
        kl_p99: nats; 99 % of all tokens have less.
        same_top, same_top_interval: share of tokens of which both find the same likeliest.
        far, far_interval: change of the nats of a token that needs far context (LongPPL), mean over
            such tokens, and its 95 % interval; None where there are none.
        far_tokens: how many there are.
        verdicts: by measure, where it has a margin.
    """

    mean: float
    by_domain: dict[str, float]
    change: float
    interval: Interval | None
    pieces: int
    kl: float
    kl_interval: Interval | None
    kl_p99: float
    same_top: float
    same_top_interval: Interval | None
    far: float | None
    far_interval: Interval | None
    far_tokens: int
    verdicts: dict[str, Verdict]

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    @property
    def decision(self) -> Decision | None:
        """The worst of all verdicts."""
        found = {verdict.decision for verdict in self.verdicts.values()}
        return next((worst for worst in ("different", "undecided", "same") if worst in found), None)


@dataclass(frozen=True, slots=True)
class FidelityReport:
    """Tokens at positions [first, length) of every document, under each configuration.

    Attributes:
        unit: what intervals rest on, `documents` or pieces of them.
        costs: of every row but the reference, whose pass computes less.
        warnings: sentences on what the numbers cannot show.
    """

    model: str
    first: int
    length: int
    unit: str
    documents: list[str]
    too_short: list[str]
    margins: dict[str, float]
    configs: dict[str, dict[str, Any]]
    results: dict[str, Fidelity]
    costs: dict[str, Cost]
    warnings: list[str]

    def judged(self) -> list[str]:
        """The attentions that are neither the reference nor a control."""
        return [name for name in self.results if name in self.costs and name not in CONTROLS]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_fidelity(
    loaded: LoadedModel,
    configs: dict[str, HiPConfig | None],
    documents: Sequence[Document],
    *,
    length: int,
    first: int | None = None,
    margins: Mapping[str, float] = MARGINS,
    controls: bool = True,
    far: bool = True,
    floor_documents: int | None = None,
    progress: Callable[[str, str], None] | None = None,
) -> FidelityReport:
    """Teacher-forced prefill of the first `length` tokens of each document under each attention.

    Args:
        configs: by name; None is dense attention. The first one is what others are compared with.
        documents: those with fewer than `length` tokens are left out and listed in the report.
        length: tokens read of each document.
        first: position of the first token that counts; a quarter of `length` if None.
        margins: maximum differences that count as none, by measure: `likelihood`, `kl`, `top1`,
            `far`.
        controls: two rows more: the reference again, in other chunks and through other kernels
            (what no difference looks like), and sinks and window with a single block (what has to
            be caught).
        far: whether to find the tokens that need far context, by one pass more of every document.
        floor_documents: how many of the documents the reference reads again; all if None.
        progress: receives document and configuration before each pass.

    Raises:
        ArgumentError: `length` or `first` leaves nothing to measure, or an unknown measure.
        FitError: `length` exceeds the context, or no document is long enough.
    """
    check_margins(margins)
    margins = {name: margin for name, margin in margins.items() if name != "answers"}
    first = check_span(loaded, length, first)
    kept = encode_documents(loaded, documents, length)
    reference = next(iter(configs))
    rows = with_controls(configs) if controls else configs
    columns: dict[str, list[Tokens]] = {name: [] for name in rows}
    costs = {name: Cost() for name in rows if name != reference}
    masks: list[Tensor] = []
    for i, (doc, ids) in enumerate(kept.items()):
        say = functools.partial(progress or _say_nothing, doc.name)
        without = floor_documents is not None and i >= floor_documents
        chosen = {name: row for name, row in rows.items() if not (without and name == FLOOR)}
        for name, tokens in _read(loaded, chosen, ids, first, costs, say):
            columns[name].append(tokens)
        if far:
            say("near context")
            loaded.use(configs[reference])
            masks.append(far_tokens(loaded, ids, first, columns[reference][-1].nll))
    units = _Units.of(list(kept), length - first)
    own = {
        name: _Units.of(list(kept)[: len(column)], length - first)
        for name, column in columns.items()
    }
    measured = {
        name: _Measured.of(
            columns[reference][: len(column)], column, own[name], masks[: len(column)]
        )
        for name, column in columns.items()
    }
    verdicts = _judge(measured, reference, margins)
    results = {name: measured[name].summary(verdicts[name]) for name in rows}
    return FidelityReport(
        model=loaded.name,
        first=first,
        length=length,
        unit=units.name,
        documents=[doc.name for doc in kept],
        too_short=[doc.name for doc in documents if doc not in kept],
        margins=dict(margins),
        configs={name: config.to_dict() if config else {} for name, config in rows.items()},
        results=results,
        costs=costs,
        warnings=_warnings(results, reference, units) + _floor(own.get(FLOOR, units), len(kept)),
    )


def _say_nothing(document: str, name: str) -> None: ...


def _read(
    loaded: LoadedModel,
    configs: dict[str, HiPConfig | None],
    ids: Tensor,
    first: int,
    costs: dict[str, Cost],
    say: Callable[[str], None],
) -> Iterator[tuple[str, Tokens]]:
    """The tokens of one document under every attention; the first is what others stand beside."""
    reference: Reference | None = None
    for name, config in configs.items():
        say(name)
        loaded.use(config)
        if reference is None:
            reference = read_reference(loaded, ids, first)
            nll = reference.nll
            yield name, Tokens(nll, torch.zeros_like(nll), torch.ones_like(nll, dtype=torch.bool))
        else:
            rows, cache = FLOOR_ROWS if name == FLOOR else None, make_cache(loaded)
            with costs[name].of_text(cache, loaded.device):
                tokens = read_beside(loaded, ids, first, reference, rows, cache)
            yield name, tokens


class _Units(NamedTuple):
    """What is independent: documents, or pieces where there are too few of them.

    Attributes:
        name: what they are called.
        size: tokens of one.
        domains: of each document.
        weights: of each unit, such that every domain counts as much as any other.
    """

    name: str
    size: int
    domains: list[str]
    weights: list[float]

    @classmethod
    def of(cls, documents: Sequence[Document], tokens: int) -> _Units:
        """For documents of so many tokens that count."""
        enough = len(documents) >= MIN_VALUES
        size = tokens if enough else PIECE
        domains = [doc.domain for doc in documents]
        sizes = [min(size, tokens - start) for start in range(0, tokens, size)]
        weights = [n / domains.count(domain) for domain in domains for n in sizes]
        return cls("documents" if enough else f"pieces of {PIECE:,} tokens", size, domains, weights)

    def means(self, columns: Sequence[Tensor]) -> list[float]:
        """The mean of each unit; a column `[tokens]` for each document."""
        return [
            float(part.double().mean()) for column in columns for part in column.split(self.size)
        ]

    def estimate_some(self, columns: Sequence[Tensor], masks: Sequence[Tensor]) -> Estimate:
        """Mean over the tokens that masks choose; each `[tokens]` of a document, some of them
        chosen in one unit or more. A unit counts by its tokens."""
        chosen = [
            part[mask]
            for column, own in zip(columns, masks, strict=True)
            for part, mask in zip(column.split(self.size), own.split(self.size), strict=True)
        ]
        parts = [part.double() for part in chosen if len(part)]
        return estimate([float(part.mean()) for part in parts], [float(len(p)) for p in parts])


class _Measured(NamedTuple):
    """One attention beside the reference, before it is judged.

    Attributes:
        nats: mean of each domain.
        estimates: of `likelihood`, `kl`, `top1` and, where tokens need far context, `far`.
        kl_p99, far_tokens: as in `Fidelity`.
    """

    nats: dict[str, float]
    estimates: dict[str, Estimate]
    kl_p99: float
    far_tokens: int

    @classmethod
    def of(
        cls,
        base: Sequence[Tokens],
        other: Sequence[Tokens],
        units: _Units,
        masks: Sequence[Tensor] = (),
    ) -> _Measured:
        """`masks`: `[tokens]` bool of each document, the tokens that need far context."""
        nlls, kls = [tokens.nll for tokens in other], [tokens.kl for tokens in other]
        of_base = units.means([tokens.nll for tokens in base])
        estimates = {
            "likelihood": estimate_change(of_base, units.means(nlls), units.weights),
            "kl": estimate(units.means(kls), units.weights),
            "top1": estimate(units.means([~tokens.same for tokens in other]), units.weights),
        }
        count = int(sum(mask.sum() for mask in masks))
        if count:
            changes = [b.nll - a.nll for a, b in zip(base, other, strict=True)]
            estimates["far"] = units.estimate_some(changes, masks)
        domains = {
            domain: mean(
                [
                    float(x.double().mean())
                    for x, d in zip(nlls, units.domains, strict=True)
                    if d == domain
                ]
            )
            for domain in dict.fromkeys(units.domains)
        }
        return cls(domains, estimates, _quantile(torch.cat(kls), 0.99), count)

    def summary(self, verdicts: dict[str, Verdict]) -> Fidelity:
        change, kl, flips = (self.estimates[name] for name in ("likelihood", "kl", "top1"))
        far, flipped = self.estimates.get("far"), flips.interval()
        return Fidelity(
            mean=mean(list(self.nats.values())),
            by_domain=self.nats,
            change=change.value,
            interval=change.interval(),
            pieces=change.units,
            kl=kl.value,
            kl_interval=kl.interval(),
            kl_p99=self.kl_p99,
            same_top=1 - flips.value,
            same_top_interval=(1 - flipped[1], 1 - flipped[0]) if flipped else None,
            far=far.value if far else None,
            far_interval=far.interval() if far else None,
            far_tokens=self.far_tokens,
            verdicts=verdicts,
        )


def _judge(
    measured: dict[str, _Measured], reference: str, margins: Mapping[str, float]
) -> dict[str, dict[str, Verdict]]:
    """Verdicts of every row; those of a measure are corrected for the number of configurations.

    Controls are judged each for itself: they say whether the others can be believed.
    """
    found: dict[str, dict[str, Verdict]] = {name: {} for name in measured}
    controls = [name for name in CONTROLS if name in measured]
    others = [name for name in measured if name not in (*controls, reference)]
    for measure, margin in margins.items():
        for family in (others, *([name] for name in controls)):
            given = {n: e for n in family if (e := measured[n].estimates.get(measure))}
            for name, verdict in zip(given, judge_all(list(given.values()), margin), strict=True):
                found[name][measure] = verdict
    return found


def _quantile(values: Tensor, share: float) -> float:
    """A quantile of `[tokens]`, which may be more than `torch.quantile` takes."""
    return float(values.kthvalue(max(math.ceil(share * len(values)), 1)).values)


def _floor(units: _Units, count: int) -> list[str]:
    """Says so where not all of the `count` documents have a noise floor."""
    own = len(units.domains)
    if own == count:
        return []
    return [f"{FLOOR}: of {own} of {count} documents, intervals over {units.name}"]


def _warnings(results: dict[str, Fidelity], reference: str, units: _Units) -> list[str]:
    found: list[str] = []
    for name, row in results.items():
        decisions = {verdict.decision for verdict in row.verdicts.values()}
        if name == FLOOR and "different" in decisions:
            found.append(f"{name}: {reference} differs from itself; nothing below can be trusted")
        blind_to_far = row.far_interval is not None and row.far_interval[0] > 0
        if name == BLIND and "different" not in decisions and not blind_to_far:
            found.append(not_caught(name))
        likelihood = row.verdicts.get("likelihood")
        if likelihood and likelihood.decision == "different" and row.change < 0:
            found.append(
                f"{name}: likelier than {reference} by more than the margin, which is no fidelity; "
                "look at KL, and for a fault of the measurement"
            )
    judged = [name for name, row in results.items() if row.verdicts and name not in CONTROLS]
    if units.name != "documents":
        found.append(
            f"intervals and verdicts hold for these texts only: {MIN_VALUES} documents or more "
            "would say something about others"
        )
    if len(judged) > 1:
        found.append(
            f"verdicts are corrected for {len(judged)} configurations (Holm); intervals are not: "
            "to choose one, confirm it by other documents"
        )
    return found
