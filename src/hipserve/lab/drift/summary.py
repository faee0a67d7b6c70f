"""From contexts to rows: means, flips both ways, and verdicts, clustered by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hipserve.lab.intervals import Estimate, Interval, estimate_clusters, estimate_flips, mean
from hipserve.lab.quality.controls import BLIND, not_caught
from hipserve.lab.verdicts import MARGINS, Decision, judge

NOISE = 0.02
"""Nats by which two dense kernels may differ in bfloat16."""


@dataclass(frozen=True, slots=True)
class Record:
    """One context under one attention, beside dense attention.

    Attributes:
        kl: nats, KL(dense || this) of the first token of the answer.
        flipped: the likeliest first token is another.
        log_odds: of the prompt's contrast, dense and this.
        followed: whether the answer matches what is expected, dense and this.
        reads: by layer, the share of the system prompt that pruned rows of the answer read; empty
            without a system prompt.
    """

    prompt: int
    label: str
    place: str
    length: int
    attention: str
    kl: float
    flipped: bool
    log_odds: tuple[float, float] | None
    followed: tuple[bool, bool] | None
    reads: dict[int, float]


@dataclass(frozen=True, slots=True)
class Summary:
    """Several contexts under one attention.

    Attributes:
        kl, kl_interval: mean over prompts, and its 95 % interval.
        flips: share of contexts with another likeliest first token.
        shift, shift_interval: mean change of the log-odds of contrasts; None without contrasts.
        decisions: contrasts decided the other way: from the first side to the second, and back.
        followed: share of answers that follow their instruction, dense and this; None where
            none is checked.
        lost, gained: answers that only dense attention, and only this one, gets right.
        decision: of KL, by the margin of `lab quality`; None without contexts.
        instructions: of the change of `followed`.
        reads: by layer, mean share of the system prompt that rows of the answer read.
    """

    contexts: int
    kl: float
    kl_interval: Interval | None
    flips: float
    shift: float | None
    shift_interval: Interval | None
    decisions: tuple[int, int]
    followed: tuple[float, float] | None
    lost: int
    gained: int
    decision: Decision | None
    instructions: Decision | None
    reads: dict[int, float]


def summarize(records: Sequence[Record]) -> Summary:
    """Contexts of one prompt are not independent: intervals are over prompts."""
    groups = [
        [r for r in records if r.prompt == i] for i in dict.fromkeys(r.prompt for r in records)
    ]
    kl = estimate_clusters([[r.kl for r in group] for group in groups]) if records else None
    odds = [[b - a for a, b in (r.log_odds for r in g if r.log_odds)] for g in groups]
    shift = estimate_clusters([own for own in odds if own]) if any(odds) else None
    pairs = [r.log_odds for r in records if r.log_odds]
    checked = [[r.followed for r in group if r.followed] for group in groups]
    signs = [[int(b) - int(a) for a, b in own] for own in checked if own]
    flat = [pair for own in checked for pair in own]
    return Summary(
        contexts=len(records),
        kl=kl.value if kl else 0.0,
        kl_interval=kl.interval() if kl else None,
        flips=mean([float(r.flipped) for r in records]) if records else 0.0,
        shift=shift.value if shift else None,
        shift_interval=shift.interval() if shift else None,
        decisions=(
            sum(a > 0 >= b for a, b in pairs),
            sum(a <= 0 < b for a, b in pairs),
        ),
        followed=_shares(flat),
        lost=sum(a and not b for a, b in flat),
        gained=sum(b and not a for a, b in flat),
        decision=judge(kl, MARGINS["kl"]).decision if kl else None,
        instructions=_decide(estimate_flips(signs)) if signs else None,
        reads=_mean_reads(records),
    )


def _mean_reads(records: Sequence[Record]) -> dict[int, float]:
    layers = sorted({layer for record in records for layer in record.reads})
    return {n: mean([r.reads[n] for r in records if n in r.reads]) for n in layers}


def _shares(pairs: Sequence[tuple[bool, bool]]) -> tuple[float, float] | None:
    if not pairs:
        return None
    return mean([float(a) for a, _ in pairs]), mean([float(b) for _, b in pairs])


def _decide(measured: Estimate) -> Decision:
    return judge(measured, MARGINS["answers"]).decision


def warnings(bare: Summary, rows: dict[str, Summary], *, pruned_bare: bool) -> list[str]:
    """What the numbers cannot show, and where the harness itself is in doubt."""
    found: list[str] = []
    if pruned_bare:
        found.append("bare prompts are long enough to be pruned: they are no control here")
    elif bare.flips or bare.kl > NOISE:
        found.append(
            "bare prompts, which read everything, differ from dense: do not trust the rest"
        )
    for name, row in rows.items():
        if name == BLIND and row.decision != "different":
            found.append(not_caught(name))
        if row.instructions == "different" and row.gained > row.lost:
            found.append(
                f"{name}: follows more instructions than dense attention, beyond noise; look for a "
                "fault of the measurement"
            )
    dense = next((row.followed[0] for row in rows.values() if row.followed), 1.0)
    if dense < 0.5:
        found.append(f"dense attention itself follows {dense:.0%} of the instructions: losses hide")
    return found
