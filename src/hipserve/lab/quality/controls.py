"""Rows that show whether to trust a measurement: one that is no difference, one that is a loss."""

from __future__ import annotations

from typing import Literal

from hipserve.config import DEFAULT, HiPConfig
from hipserve.models import LoadedModel
from hipserve.plan.rule import FURTHEST
from hipserve.platform import native_library

FLOOR, BLIND = "noise floor", "sinks + window"
CONTROLS = (FLOOR, BLIND)

Dense = Literal["sdpa", "hip"]


def with_controls(configs: dict[str, HiPConfig | None]) -> dict[str, HiPConfig | None]:
    """Behind the reference its double, and at the end what is blind to the middle of a text.

    The double of dense attention is dense attention by other kernels: HiP's own of SDPA, and SDPA
    of HiP's own.
    """
    (reference, own), *others = configs.items()
    base = own or next((config for _, config in others if config), DEFAULT)
    double = None if own and own == everything(own) else own or everything(base)
    return {reference: own, FLOOR: double, **dict(others), BLIND: blind(base)}


def everything(base: HiPConfig) -> HiPConfig:
    """Dense attention by HiP's own kernels: they read every key."""
    return base.replace(dense_below=FURTHEST, decode_dense_below=FURTHEST)


def faster_dense(loaded: LoadedModel, base: HiPConfig) -> Dense:
    """Kernels of dense attention: HiP's on a CPU that has them, where SDPA takes several times as
    long, and SDPA elsewhere or where positions beyond the trained length are extended."""
    native = loaded.device.type == "cpu" and native_library().tier
    return "hip" if native and not base.streams else "sdpa"


def blind(base: HiPConfig) -> HiPConfig:
    """Sinks and window, and of everything between them the single block that no budget is below.

    By the mean of a run: a good search would find in that block most of what there is to find.
    """
    return base.replace(
        selector="bound",
        bound_reach=0.0,
        rerank=0,
        budget=base.granularity,
        budget_factors=((),),
        dense_layers=(),
        dense_below=0,
        decode_dense_below=0,
    )


def not_caught(name: str) -> str:
    """The warning where `BLIND` was not told from the reference."""
    return (
        f"{name} was not caught: this does not show what pruning loses; give more or longer texts"
    )
