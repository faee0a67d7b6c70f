"""Kernels in a chain: each may start while the one before it ends (dependent launch, Hopper)."""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton for other GPUs, whose kernels are never chained
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def dependent_launch_wait(CHAINED: tl.constexpr):
    """Waits for all that earlier kernels wrote: the first thing that a chained kernel does.

    Every program waits, so each kernel ends after all those before it.
    """
    if CHAINED:
        gdc_wait()


@triton.jit
def dependent_launch_signal(CHAINED: tl.constexpr):
    """Lets the next kernel be scheduled once all programs of this one are.

    Only for kernels that leave processors free: otherwise waiting programs displace working ones.
    """
    if CHAINED:
        gdc_launch_dependents()
