"""What a benchmark returns, and how it is written down."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hipserve.config import HiPConfig
from hipserve.lab.provenance import Provenance
from hipserve.lab.speed.inputs import LayerShape
from hipserve.lab.speed.numerics import Check

Phase = Literal["prefill", "decode"]
FIT_FROM = 8 * 1024
"""Shortest length that takes part in the fit of an exponent."""

CSV_FIELDS = ("phase", "length", "contender", "seconds", "rounds", "heads_timed", "reads_all")


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of a whole layer.

    `heads_timed` query heads were run; the rest is scale.
    """

    seconds: float
    rounds: int
    heads_timed: int


@dataclass(frozen=True, slots=True)
class Point:
    """All contenders at one length; where HiP `reads_all`, it is the dense path."""

    phase: Phase
    length: int
    timings: dict[str, Timing]
    reads_all: bool = False

    def seconds(self, contender: str) -> float:
        return self.timings[contender].seconds

    def ratio(self, baseline: str, contender: str) -> float:
        """How many times longer the baseline takes."""
        return self.seconds(baseline) / self.seconds(contender)

    def share(self, part: str, whole: str = "hip") -> float:
        return self.seconds(part) / self.seconds(whole)


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """Numbers of `hipserve bench attention`; there are none unless all checks passed.

    `config` is that of the machine, its crossovers measured; `dense_kernel` is the one that HiP
    takes for rows that read everything.
    """

    provenance: Provenance
    shape: LayerShape
    dtype: str
    backend: str
    dense_kernel: str
    config: HiPConfig
    checks: list[Check]
    points: list[Point]

    def of(self, phase: Phase) -> list[Point]:
        return [point for point in self.points if point.phase == phase]

    def exponent(self, phase: Phase, contender: str) -> float | None:
        """e of time ~ length^e from 8k on; None with fewer than two lengths."""
        points = [point for point in self.of(phase) if point.length >= FIT_FROM]
        if len(points) < 2:
            return None
        return fit_exponent([p.length for p in points], [p.seconds(contender) for p in points])

    def exponents(self) -> dict[str, dict[str, float | None]]:
        phases: tuple[Phase, ...] = ("prefill", "decode")
        return {
            phase: {name: self.exponent(phase, name) for name in points[0].timings}
            for phase in phases
            if (points := self.of(phase))
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "provenance": self.provenance.to_dict(),
            "shape": asdict(self.shape),
            "dtype": self.dtype,
            "backend": self.backend,
            "dense_kernel": self.dense_kernel,
            "config": self.config.to_dict(),
            "checks": [asdict(check) for check in self.checks],
            "points": [asdict(point) for point in self.points],
            "exponents": self.exponents(),
        }

    def to_csv(self) -> str:
        """A row for each time; lines that start with # say where they come from."""
        text = io.StringIO()
        for line in self._header():
            text.write(f"# {line}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_FIELDS)
        for point in self.points:
            for name, timing in point.timings.items():
                row = (f"{timing.seconds:.6g}", timing.rounds, timing.heads_timed)
                row = (*row, int(point.reads_all and name == "hip"))
                writer.writerow((point.phase, point.length, name, *row))
        return text.getvalue()

    def _header(self) -> list[str]:
        values: dict[str, Any] = {
            **self.provenance.to_dict(),
            "heads": f"{self.shape.num_q_heads}/{self.shape.num_kv_heads}",
            "head_dim": self.shape.head_dim,
            "dtype": self.dtype,
            "backend": self.backend,
            "dense_kernel": self.dense_kernel,
            **{f"config.{name}": value for name, value in self.config.to_dict().items()},
        }
        return [f"{name}: {value}" for name, value in values.items()]


def fit_exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Least-squares slope of log(seconds) over log(length)."""
    xs, ys = [math.log(n) for n in lengths], [math.log(s) for s in seconds]
    x_mean, y_mean = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    rise = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return rise / math.fsum((x - x_mean) ** 2 for x in xs)
