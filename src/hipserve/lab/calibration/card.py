"""HiP or dense? What a calibration answers, in a few plain sentences."""

from __future__ import annotations

from hipserve.lab.calibration.measure import Calibration
from hipserve.lab.shown import counted


def rule_card(made: Calibration) -> list[str]:
    """Sentences: what holds, what it gains, and when dense attention is preferable."""
    return [*_verdict(made), *_speed(made), *_rules(made)]


def _verdict(made: Calibration) -> list[str]:
    asked = f"a loss of at most {made.max_loss:.2%} at {made.length:,} tokens"
    confident = (
        f"with {made.confidence:.0%} confidence ({counted(len(made.report), 'held-out document')})"
    )
    holds, first = made.walk.certified, made.walk.tested[0]
    if not made.caught:
        return [
            f"not certified: sinks and window alone lose {made.blind_loss:+.2%} on these texts, "
            "which therefore cannot show what pruning loses: lower the limit, or give texts whose "
            "far parts matter"
        ]
    if holds is not None:
        bound = f"best estimate {holds.loss:+.2%}, at most {holds.bound:+.2%}"
        return [f"HiP with {holds.name}: {asked} {confident}: {bound}"]
    return [
        f"not certified: {asked} {confident}; best estimate {first.loss:+.2%} with {first.name}; "
        f"{_missing(made)}"
    ]


def _missing(made: Calibration) -> str:
    first = made.walk.tested[0]
    if made.walk.missing is not None:
        # as many again are needed to choose by
        return f"about {2 * made.walk.missing} more documents"
    if first.loss < made.max_loss:
        return "too near to the limit for any number of documents"
    return "more documents would not help: allow a greater loss, or use dense attention"


def _speed(made: Calibration) -> list[str]:
    dense, hip = made.seconds["dense"], made.seconds["hip"]
    ratio = f"dense {dense:.2f} s, {made.best} {hip:.2f} s ({dense / hip:.2f}x)"
    return [f"a prefill of {made.length:,} tokens here: {ratio}"]


def _rules(made: Calibration) -> list[str]:
    below = f"{made.dense_below:,} tokens for prompts, {made.decode_dense_below:,} for new tokens"
    lines = [
        f"dense attention is preferable below {below}: HiP attention switches there by itself",
        f"dense attention is preferable beyond {made.length:,} tokens until those are certified",
        "dense attention is preferable for counting and summing up over a whole text: no budget "
        "reads everything",
    ]
    if made.seconds["hip"] >= made.seconds["dense"]:
        lines.insert(
            0, f"dense attention is preferable at {made.length:,} tokens: HiP is no faster"
        )
    if made.certified and made.length <= made.dense_below:
        lines.insert(
            0,
            f"this configuration changes nothing at {made.length:,} tokens: dense attention is "
            f"preferable wherever it is certified; calibrate at more than {made.dense_below:,}",
        )
    return lines
