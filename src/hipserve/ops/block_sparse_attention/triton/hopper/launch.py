"""Launches the kernel."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hipserve.ops.block_sparse_attention.triton.hopper.kernel import hopper_kernel
from hipserve.ops.block_sparse_attention.triton.hopper.shape import Shape
from hipserve.ops.block_sparse_attention.triton.inputs import Inputs
from hipserve.ops.block_sparse_attention.triton.tiling import RUN
from hipserve.platform import gpu_processors

HALF = 64
REGISTERS = 168
"""Registers of a thread at the start: 12 warps, four of them without work, share the 65,536 of a
processor. Consumers then take what producers give up."""
CONSUMER_REGISTERS = 232
PRODUCER_REGISTERS = 40


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    inputs: Inputs,
    turned: Tensor | None,
    found: tuple[Tensor, Tensor],
    *,
    sm_scale: float,
    shape: Shape,
) -> None:
    """Writes what `hipserve.ops.block_sparse_attention` returns; `shape` is that of the call.

    turned: `[num_query_blocks * heads, room, 1, head_dim]`, as `turn_keys` returns it, or None.
    found: out `[num_tokens, num_q_heads, head_dim]`, as `q`, and lse `[num_tokens, num_q_heads]`
        float32, both contiguous.
    """
    block_table, query_blocks, indices, window_start, _ = inputs
    blocks = query_blocks.shape[0]
    items = blocks * shape.heads * shape.head_tiles
    programs = min(items, gpu_processors(q.device))
    listed = (
        *(block_table, block_table.stride(0), query_blocks),
        query_blocks if indices is None else indices,
        query_blocks if window_start is None else window_start,
    )
    keys = describe(k_cache, [1, RUN, 1, HALF])
    hopper_kernel[(programs,)](
        describe(q, [shape.rows, 1, HALF]),
        keys,
        keys if turned is None else describe(turned, [1, RUN, 1, HALF]),
        describe(v_cache, [1, RUN, 1, HALF]),
        *(*found, listed, blocks, blocks - 1, items, programs, sm_scale * math.log2(math.e)),
        SHAPE=shape,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        maxnreg=REGISTERS,
    )


def describe(x: Tensor, box: list[int]) -> Any:
    """A tensor as the copy engine takes it, in boxes.

    x: `[num_tokens, num_q_heads, head_dim]` or `[num_pages, page_size, num_kv_heads, head_dim]`.
    """
    layout = gl.NVMMASharedLayout(128, 16, rank=len(box))
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)
