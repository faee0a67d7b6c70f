"""`lab speed`: where pruning starts to pay, and how much, on every backend and ISA tier of a CPU.

The measurement is that of `bench attention`, every row pruned, once in a process of each tier:
native kernels choose their tier when they are loaded.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from hipserve.attention.crossover import rule_for
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, did_you_mean
from hipserve.lab.speed.attention import Progress, bench_attention, check_inputs
from hipserve.lab.speed.inputs import LayerShape
from hipserve.lab.speed.report import AttentionReport, Phase, Point
from hipserve.lab.speed.timing import Limits
from hipserve.plan import pruning_rule
from hipserve.platform import NATIVE_TIERS, native_library

REFERENCE = "reference"
REFERENCE_LENGTH = 2048
"""Most tokens of the reference, which is slow, and is there to be compared with."""
FORCE = "HIPSERVE_CPU_ISA"


@dataclass(frozen=True, slots=True)
class TierReport:
    """One backend or tier.

    Attributes:
        name: `reference`, or an ISA tier of the native kernels.
        measured: with every row pruned, whatever the crossover.
        used: position from which hipserve prunes on this machine, by phase.
    """

    name: str
    measured: AttentionReport
    used: dict[Phase, int]

    def crossover(self, phase: Phase) -> int | None:
        """Tokens from which pruned attention stays faster than dense attention; None: it never
        does in the lengths that were measured."""
        points = [point for point in self.measured.of(phase) if not point.reads_all]
        return crossing([point.length for point in points], [gain(point) for point in points])


@dataclass(frozen=True, slots=True)
class MachineReport:
    """All tiers of one machine, the fastest last."""

    lengths: list[int]
    tiers: list[TierReport]

    def to_dict(self) -> dict[str, Any]:
        phases: tuple[Phase, ...] = ("prefill", "decode")
        return {
            "lengths": self.lengths,
            "tiers": [
                {
                    "name": tier.name,
                    "crossover": {phase: tier.crossover(phase) for phase in phases},
                    "used": tier.used,
                    "measured": tier.measured.to_dict(),
                }
                for tier in self.tiers
            ],
        }


def gain(point: Point) -> float:
    """How many times as long the faster of two dense kernels takes: ours, or torch's SDPA."""
    return min(point.ratio(name, "hip") for name in ("dense", "sdpa"))


def crossing(lengths: Sequence[int], gains: Sequence[float]) -> int | None:
    """The length from which gains stay above 1, by their logarithms between two lengths; the first
    length if all are, None if the last is not."""
    if not gains or gains[-1] <= 1:
        return None
    slow = [i for i, value in enumerate(gains) if value <= 1]
    if not slow:
        return lengths[0]
    low, high = slow[-1], slow[-1] + 1
    below, above = math.log(gains[low]), math.log(gains[high])
    return round(lengths[low] * (lengths[high] / lengths[low]) ** (-below / (above - below)))


def machine_tiers() -> list[str]:
    """What can be measured here, the slowest first."""
    tier = native_library().tier
    native = NATIVE_TIERS[: NATIVE_TIERS.index(tier) + 1] if tier else ()
    return [REFERENCE, *native]


def measure_machine(
    lengths: Sequence[int],
    *,
    tiers: Sequence[str] = (),
    shape: LayerShape | None = None,
    dtype: torch.dtype = torch.bfloat16,
    config: HiPConfig | None = None,
    limits: Limits | None = None,
    progress: Progress = lambda _: None,
) -> MachineReport:
    """Times one layer on every tier, checked against float64 first.

    Args:
        lengths: context lengths, in tokens, ascending; the reference gets those up to 2,048.
        tiers: of `machine_tiers()`; all of them if empty.
        shape, dtype, config, limits, progress: as in `bench_attention`.

    Raises:
        NumericsError: a result is wrong; no time of a wrong result is reported.
        ArgumentError: a tier that this machine does not have, or a length that cannot be used.
    """
    known = machine_tiers()
    chosen = [name for name in known if name in tiers] if tiers else known
    for name in tiers:
        if name not in known:
            expected = f"one of {', '.join(known)}"
            raise ArgumentError("tiers", expected, repr(name), did_you_mean(name, known))
    if list(lengths) != sorted(set(lengths)):
        raise ArgumentError("lengths", "ascending lengths", str(list(lengths)))
    shape, config, limits = shape or LayerShape(), config or HiPConfig(), limits or Limits()
    check_inputs(lengths, shape, "cpu", limits)
    found: list[TierReport] = []
    for i, name in enumerate(chosen, start=1):
        own = [n for n in lengths if name != REFERENCE or n <= REFERENCE_LENGTH]
        if not own:
            continue
        progress(f"{name}, {i} of {len(chosen)}")
        found.append(_in_a_process(name, own, shape, dtype, config, limits))
    return MachineReport(list(lengths), found)


def _in_a_process(name: str, *given: Any) -> TierReport:
    with process(name) as pool:
        return pool.submit(_measure, name, *given).result()


def process(name: str) -> ProcessPoolExecutor:
    """A new process that runs a tier, with as many threads as this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _begin, (name, torch.get_num_threads()))


def running_tier() -> str | None:
    """The tier that native kernels run here."""
    return native_library().tier


def _begin(name: str, threads: int) -> None:
    """In the new process, before native kernels are loaded."""
    if name != REFERENCE:
        os.environ[FORCE] = name
    torch.set_num_threads(threads)


def _measure(
    name: str,
    lengths: list[int],
    shape: LayerShape,
    dtype: torch.dtype,
    config: HiPConfig,
    limits: Limits,
) -> TierReport:
    backend = REFERENCE if name == REFERENCE else "cpu"
    pruned = config.replace(dense_below=0, decode_dense_below=0)
    report = bench_attention(
        lengths, shape=shape, dtype=dtype, config=pruned, backend=backend, limits=limits
    )
    if name == REFERENCE:
        rule = pruning_rule(config, "cpu")
    else:
        rule = rule_for(config, torch.device("cpu"), dtype, shape.head_dim, shape.group_size)
    made = replace(report.provenance, isa=name)
    used: dict[Phase, int] = {"prefill": rule.dense_below, "decode": rule.decode_dense_below}
    return TierReport(name, replace(report, provenance=made), used)
