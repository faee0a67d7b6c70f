"""Rows that show whether to trust a measurement: one that is no difference, one that is a loss."""

from __future__ import annotations

from hipserve.config import DEFAULT, HiPConfig

FLOOR, BLIND = "noise floor", "sinks + window"


def with_controls(configs: dict[str, HiPConfig | None], length: int) -> dict[str, HiPConfig | None]:
    """Behind the reference its double, and at the end what is blind to the middle of a text.

    The double of dense attention is dense attention by HiP's own kernels.
    """
    (reference, own), *others = configs.items()
    base = own or next((config for _, config in others if config), DEFAULT)
    everything = base.replace(dense_below=length + 1, decode_dense_below=length + 1)
    return {reference: own, FLOOR: own or everything, **dict(others), BLIND: blind(base)}


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
