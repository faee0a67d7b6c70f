"""The barrier of programs that share a query block and head, and why it is safe.

A barrier in a kernel deadlocks if a program waits for one that cannot start. Here that cannot
happen: programs that share follow each other (`scratch.program_item`), a GPU starts programs in
order, and `most_sharers` never lets more of them share than the GPU has processors. So whenever
the first one that is unfinished waits, all that it waits for have started or will.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hipserve.platform import gpu_processors

MAX_SHARERS = 16


def most_sharers(device: torch.device) -> int:
    """Most programs that may share a query block and head: what makes `grid_barrier` safe."""
    return min(MAX_SHARERS, gpu_processors(device))


@triton.jit
def grid_barrier(arrivals, times, TILING: tl.constexpr):
    """Waits until all programs that share the search were here for the `times`-th time.

    arrivals: pointer to their counter, 0 at first.
    """
    tl.debug_barrier()
    if TILING.search_programs > 1:
        tl.atomic_add(arrivals, 1, sem="release")
        while tl.atomic_add(arrivals, 0, sem="acquire") < times * TILING.search_programs:
            pass
        tl.debug_barrier()
