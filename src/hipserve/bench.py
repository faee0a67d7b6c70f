"""`hipserve.bench` of 0.1: its names live in `hipserve.lab` now, and warn here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hipserve.lazy import moved as _moved

if TYPE_CHECKING:
    from hipserve.lab import (
        AttentionReport,
        Clock,
        LayerShape,
        Limits,
        Phase,
        Point,
        bench_attention,
        fit_exponent,
    )

__all__ = [
    "AttentionReport",
    "Clock",
    "LayerShape",
    "Limits",
    "Phase",
    "Point",
    "bench_attention",
    "fit_exponent",
]

__getattr__ = _moved(__name__, "hipserve.lab", __all__)
