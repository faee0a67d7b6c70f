"""Keys as query blocks beyond the trained length see them, turned before attention reads them.

Such a block sees what it reads at consecutive positions that end where its window starts: sinks and
chosen blocks are moved, the window is not. The moved keys of each block are written in the order of
its list, so that attention reads them as it reads keys in pages, by whatever kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipserve.ops._triton import pages
from hipserve.ops._triton.chain import dependent_launch_wait
from hipserve.ops._triton.rope import in_eights, turn_tile
from hipserve.ops._triton.rows import kv_head_of, load_query_block
from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.block_sparse_attention.triton.inputs import Inputs
from hipserve.ops.block_sparse_attention.triton.key_list import list_keys, list_positions
from hipserve.ops.block_sparse_attention.triton.tiling import RUN, Geometry, Plan

ROOM_BYTES = 256 << 20
"""Turned keys that are kept at a time; more query blocks take turns."""
PROGRAMS = 4096
"""A launch of fewer would leave a large GPU idle; more than fit it take their turn."""


def blocks_at_a_time(geometry: Geometry, element_size: int) -> int:
    """Query blocks whose turned keys have room; a multiple of 16 where it can be, as kernels are
    compiled for how pointers are aligned."""
    block = geometry.heads * geometry.room * geometry.head_dim * element_size
    return max(ROOM_BYTES // block // 16 * 16, 1)


def turned_parts(
    q: Tensor, k_cache: Tensor, inputs: Inputs, rope: Tensor, trained_length: int, plan: Plan
) -> Iterator[tuple[Inputs, Tensor]]:
    """Some query blocks at a time, and the keys that were turned for them, which are read before
    the next ones are.

    The arguments are those of `turn_keys`, q `[num_tokens, num_q_heads, head_dim]` as well.
    """
    for some in inputs.parts(blocks_at_a_time(plan.geometry, q.element_size())):
        yield some, turn_keys(q, k_cache, some, rope, trained_length, plan)


def turn_keys(
    q: Tensor, k_cache: Tensor, inputs: Inputs, rope: Tensor, trained_length: int, plan: Plan
) -> Tensor:
    """The moved keys of each query block and head, in the order of its list.

    Args:
        q: `[num_tokens, num_q_heads, head_dim]`; only its dtype counts.
        k_cache: `[num_pages, page_size, num_kv_heads, head_dim]`.
        inputs: what the query blocks read.
        rope: `[2, head_dim]` int32, as in `hipserve.ops.rope`.
        trained_length: blocks that begin before it see their keys where they are.
        plan: of the call.

    Returns:
        `[num_query_blocks * heads, room, 1, head_dim]`, as q; anything behind the last key.
    """
    table, query_blocks, indices, window_start, lists = inputs
    geometry, tiling = plan
    items, room = query_blocks.shape[0] * geometry.heads, geometry.room
    shape = (items, room, 1, geometry.head_dim)
    turned = torch.empty(shape, dtype=q.dtype, device=q.device)
    programs = min(max(PROGRAMS // items, 1), room // RUN)
    turn_kernel[(items, programs)](
        *(turned, k_cache, k_cache.stride()[:3], table, table.stride(0)),
        *(query_blocks, indices, window_start, lists, 0 if lists is None else lists.shape[2]),
        *(k_cache.shape[1], rope, trained_length),
        RUN=RUN,
        GEOMETRY=geometry,
        TILING=tiling,
        num_warps=1,
        launch_pdl=tiling.chained,
    )
    return turned


@triton.jit(do_not_specialize=["list_stride"])
def turn_kernel(
    turned,
    k,
    k_strides,
    block_table,
    table_stride,
    query_blocks,
    indices,
    window_start,
    lists,
    list_stride,
    page_size,
    rope,
    trained_length,
    RUN: tl.constexpr,
    GEOMETRY: tl.constexpr,
    TILING: tl.constexpr,
):
    """Turns the n-th key of a list from its position to window - moved + n, where it is seen.

    Programs that share a list take runs of it in turn. Keys of a chosen block move together.
    """
    dependent_launch_wait(TILING.chained)
    item = tl.program_id(0)
    block, head = item // GEOMETRY.heads, item % GEOMETRY.heads
    query_block = load_query_block(query_blocks, block)
    k_strides = pages.CacheStrides(*k_strides)
    table = block_table + query_block.seq.to(tl.int64) * table_stride
    if GEOMETRY.tiled:
        table = lists + item.to(tl.int64) * list_stride
    head_start = k + kv_head_of(head, GEOMETRY) * k_strides.head
    rows = pages.PagedRows(head_start, k_strides, table, page_size)
    blocks = indices + item.to(tl.int64) * GEOMETRY.max_selected
    key_list = list_keys(blocks, window_start, block, query_block, 0, GEOMETRY, TILING)
    moved = key_list.sinks + key_list.chosen
    moves = query_block.position >= trained_length
    eights = in_eights(rope, GEOMETRY.head_dim, GEOMETRY.dim)
    SIZE: tl.constexpr = min(GEOMETRY.key_block_size, RUN)
    i, d = tl.arange(0, RUN), tl.arange(0, GEOMETRY.dim)
    out = turned + item.to(tl.int64) * (GEOMETRY.room * GEOMETRY.head_dim)
    for start in range(tl.program_id(1) * RUN, moved, tl.num_programs(1) * RUN):
        n = start + i
        there = n < moved
        positions = n  # tiles follow each other as the keys of the list do
        if not GEOMETRY.tiled:
            positions = list_positions(key_list, n, GEOMETRY.key_block_size)
        k_rows = rows.start + pages.key_offsets(rows, positions, there)
        tile = load_tile(k_rows, there, GEOMETRY.head_dim, GEOMETRY.dim)  # [RUN, DIM]
        tile = tile.to(turned.dtype.element_ty)
        if moves:
            first = start + tl.arange(0, RUN // SIZE) * SIZE
            by = key_list.window - moved + first
            by -= list_positions(key_list, first, GEOMETRY.key_block_size)  # [RUN / SIZE]
            by = tl.where(first < moved, by, 0)
            HEAD_DIM: tl.constexpr = GEOMETRY.head_dim
            if eights:
                tile = turn_tile(tile, k_rows, there, by, rope, HEAD_DIM, GEOMETRY.dim, True)
            else:
                tile = turn_tile(tile, k_rows, there, by, rope, HEAD_DIM, GEOMETRY.dim, False)
        to = out + n[:, None] * GEOMETRY.head_dim + d[None, :]
        tl.store(to, tile, mask=(n < GEOMETRY.room)[:, None] & (d < GEOMETRY.head_dim)[None, :])
