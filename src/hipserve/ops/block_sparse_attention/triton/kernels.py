"""The two kernels: attention over a list of keys, and the merge of lists that were split."""

from __future__ import annotations

import triton
import triton.language as tl

from hipserve.ops._triton import pages, rows
from hipserve.ops._triton.chain import dependent_launch_wait
from hipserve.ops._triton.rows import kv_head_of, load_query_block
from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.block_sparse_attention.triton import softmax
from hipserve.ops.block_sparse_attention.triton.key_list import list_keys, tile_range
from hipserve.ops.block_sparse_attention.triton.softmax import attend_tile


@triton.jit(do_not_specialize=["lse_stride", "num_query_blocks", "list_stride"])
def attention_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    out,
    out_strides,
    lse,
    lse_stride,
    block_table,
    table_stride,
    query_blocks,
    num_query_blocks,
    indices,
    window_start,
    lists,
    list_stride,
    page_size,
    sliding_window,
    scales,
    softcap,
    turned,
    GEOMETRY: tl.constexpr,
    TILING: tl.constexpr,
):
    """out = softmax(scale * q k^T) v * v_scale over the keys that a query block reads, and lse.

    A program takes a tile of the stacked rows of one query block and group of heads, and one split
    of their key list; with more than one split, `out` and `lse` are the parts that `merge_kernel`
    joins. The last query blocks, which see the most keys, come first. With `lists`, the keys are in
    tiles, and the table of a query block and head lists those of its keys in the order of the list.
    With `turned`, sinks and chosen keys are read there (`turn_kernel`).
    """
    dependent_launch_wait(TILING.chained)
    q_strides, out_strides = rows.RowStrides(*q_strides), rows.RowStrides(*out_strides)
    k_strides, v_strides = pages.CacheStrides(*k_strides), pages.CacheStrides(*v_strides)
    scales = softmax.Scales(*scales)
    split = tl.program_id(0) % TILING.splits
    row_tile = tl.program_id(0) // TILING.splits % TILING.row_tiles
    block = num_query_blocks - 1 - tl.program_id(0) // (TILING.splits * TILING.row_tiles)
    head = tl.program_id(1)
    query_block = load_query_block(query_blocks, block)
    if row_tile * TILING.rows >= query_block.num_rows * GEOMETRY.group_size:
        return

    r = row_tile * TILING.rows + tl.arange(0, TILING.rows)
    row, q_head = r // GEOMETRY.group_size, head * GEOMETRY.group_size + r % GEOMETRY.group_size
    valid = row < query_block.num_rows
    q_rows = (
        q + (query_block.first_row + row) * q_strides.token + q_head.to(tl.int64) * q_strides.head
    )
    q_tile = load_tile(q_rows, valid, GEOMETRY.head_dim, GEOMETRY.dim)  # [ROWS, DIM]
    kv_head = kv_head_of(head, GEOMETRY)
    table = block_table + query_block.seq.to(tl.int64) * table_stride
    item = block.to(tl.int64) * GEOMETRY.heads + head
    if GEOMETRY.tiled:
        table = lists + item * list_stride
    if GEOMETRY.streams:
        turned += item * (GEOMETRY.room * GEOMETRY.head_dim)

    blocks = indices + item * GEOMETRY.max_selected
    key_list = list_keys(blocks, window_start, block, query_block, sliding_window, GEOMETRY, TILING)
    part = tile_range(key_list, row_tile, split, query_block.num_rows, GEOMETRY, TILING)

    ROWS: tl.constexpr = TILING.rows
    DIM: tl.constexpr = GEOMETRY.dim
    state = softmax.Softmax(
        acc=tl.zeros([ROWS, DIM], tl.float32),
        maximum=tl.full([ROWS], -float("inf"), tl.float32),
        total=tl.zeros([ROWS], tl.float32),
    )
    reading = softmax.Reading(
        q_tile=q_tile,
        k_pages=pages.PagedRows(k + kv_head * k_strides.head, k_strides, table, page_size),
        v_pages=pages.PagedRows(v + kv_head * v_strides.head, v_strides, table, page_size),
        key_list=key_list,
        end=part.end,
        last_seen=key_list.own + row,
        position=query_block.position + row,
        sm_scale=scales.scores,
        softcap=softcap,
        sliding_window=sliding_window,
        turned=turned,
    )
    for start in range(part.begin, part.whole, TILING.keys):
        state = attend_tile(state, reading, start, False, GEOMETRY, TILING)
    for start in range(tl.maximum(part.begin, part.whole), part.end, TILING.keys):
        state = attend_tile(state, reading, start, True, GEOMETRY, TILING)

    LN2: tl.constexpr = 0.6931471805599453
    divisor = tl.where(state.total > 0, state.total, 1.0)
    logsum = (state.maximum + tl.log2(divisor)) * LN2
    logsum = tl.where(state.total > 0, logsum, -float("inf"))
    token = query_block.first_row + row + split.to(tl.int64) * lse_stride
    num_heads: tl.constexpr = GEOMETRY.heads * GEOMETRY.group_size
    tl.store(lse + token * num_heads + q_head, logsum, mask=valid)  # [ROWS]
    d = tl.arange(0, DIM)
    out_rows = out + token * out_strides.token + q_head * out_strides.head
    keep = valid[:, None] & (d < GEOMETRY.head_dim)[None, :]
    result = (state.acc / divisor[:, None] * scales.outputs).to(out.dtype.element_ty)
    tl.store(out_rows[:, None] + d[None, :], result, mask=keep)  # [ROWS, DIM]


@triton.jit(do_not_specialize=["num_tokens"])
def merge_kernel(
    parts,
    part_lse,
    out,
    out_strides,
    lse,
    num_tokens,
    SPLITS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    TILING: tl.constexpr,
):
    """Joins the splits of one row and head: out = sum e^(lse_i - lse) out_i.

    parts: `[splits * num_tokens, num_q_heads, head_dim]` float32, `part_lse` without the last axis.
    """
    dependent_launch_wait(TILING.chained)
    out_strides = rows.RowStrides(*out_strides)
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads: tl.constexpr = GEOMETRY.heads * GEOMETRY.group_size
    d = tl.arange(0, GEOMETRY.dim)
    split = tl.arange(0, SPLITS)
    there = split < TILING.splits
    row = (split * num_tokens + token) * num_heads + head
    sums = tl.load(part_lse + row, mask=there, other=-float("inf"))  # [SPLITS]
    maximum = tl.max(sums, axis=0)
    weight = tl.exp2((sums - tl.where(maximum == -float("inf"), 0.0, maximum)) * LOG2E)
    total = tl.sum(weight, axis=0)
    inside = there[:, None] & (d < GEOMETRY.head_dim)[None, :]
    at = parts + row[:, None] * GEOMETRY.head_dim + d[None, :]
    pieces = tl.load(at, mask=inside, other=0.0)  # [SPLITS, DIM]
    divisor = tl.where(total > 0, total, 1.0)
    joined = tl.sum(pieces * weight[:, None], axis=0) / divisor
    to = out + token * out_strides.token + head * out_strides.head + d
    tl.store(to, joined.to(out.dtype.element_ty), mask=d < GEOMETRY.head_dim)  # [DIM]
    logsum = tl.where(total > 0, maximum + tl.log2(divisor) * LN2, -float("inf"))
    tl.store(lse + token * num_heads + head, logsum)
