"""Shared memory: tiles of query rows, keys and values, and the barriers that guard them.

A barrier has phases, which end when all that it counts has arrived. A tile is in turn filled by a
producer, which waits until it is empty, and read by the consumers, which wait until it is full.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

RUN = gl.constexpr(16)
HALF = gl.constexpr(64)
"""Elements of 128 bytes, the width that shared memory is swizzled by: rows lie in such pieces."""


class Tiles(NamedTuple):
    """Tiles of one kind, and for each a barrier of either kind."""

    pieces: Any
    """`[tiles * head_dim // 64 * parts of a tile, rows of a part, 64]`, as copies fill them."""
    full: Any
    empty: Any


class Memory(NamedTuple):
    """What the warps of a program share."""

    q: Any
    """`Tiles`, one for each group of consumers."""
    k: Any
    v: Any
    """`Tiles` of SHAPE.stages each. One more barrier of `v.full` is for values in need of care."""
    turns: Any
    """A barrier for each group of consumers: its turn to start products."""


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers whose phases end after so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def allocate(q_desc, k_desc, v_desc, SHAPE: gl.constexpr):
    """The `Memory` of a program."""
    HALVES: gl.constexpr = SHAPE.head_dim // HALF
    PIECES: gl.constexpr = SHAPE.stages * HALVES * (SHAPE.keys // RUN)
    STAGES: gl.constexpr = SHAPE.stages
    EXTRA: gl.constexpr = STAGES + 1
    q = gl.allocate_shared_memory(q_desc.dtype, [2 * HALVES, SHAPE.rows, 1, HALF], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [PIECES, 1, RUN, 1, HALF], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [PIECES, 1, RUN, 1, HALF], v_desc.layout)
    return Memory(
        Tiles(q, barriers(2, 1), barriers(2, 1)),
        Tiles(k, barriers(STAGES, 1), barriers(STAGES, 2)),
        Tiles(v, barriers(EXTRA, 1), barriers(STAGES, 2)),
        barriers(2, 1),
    )


@gluon.jit
def tiles_of(pieces, COUNT: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """`[COUNT, ROWS, HEAD_DIM]`: the pieces as products read them."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    return pieces._reinterpret(pieces.dtype, [COUNT, ROWS, HEAD_DIM], layout)
