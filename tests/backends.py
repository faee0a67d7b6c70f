"""Every backend and every ISA tier of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hipserve.platform import NATIVE_TIERS, native_library

NATIVE = native_library().tier is not None
TIERS = (
    NATIVE_TIERS[: NATIVE_TIERS.index(native_library().tier or "baseline") + 1] if NATIVE else ()
)
NAMES = ("reference", *(f"cpu:{tier}" for tier in TIERS))


def without_amx(name: str) -> list[Any]:
    """A parameter that is skipped, saying why, where everything but AMX runs; none elsewhere."""
    refusal = native_library().amx_refusal
    return [pytest.param(name, marks=pytest.mark.skip(reason=refusal))] if refusal else []


every_backend = pytest.mark.parametrize("backend", [*NAMES, *without_amx("cpu:amx")])
every_tier = pytest.mark.parametrize("tier", [*TIERS, *without_amx("amx")])
native = pytest.mark.skipif(not NATIVE, reason=f"no native kernels: {native_library().reason}")


@contextmanager
def using(backend: str) -> Iterator[str]:
    """Forces the ISA tier of `cpu:<tier>` and gives the name the operations take."""
    name, _, tier = backend.partition(":")
    if not tier:
        yield name
        return
    former = torch.ops.hipserve_cpu.isa()
    torch.ops.hipserve_cpu.set_isa(NATIVE_TIERS.index(tier))
    try:
        yield name
    finally:
        torch.ops.hipserve_cpu.set_isa(former)
