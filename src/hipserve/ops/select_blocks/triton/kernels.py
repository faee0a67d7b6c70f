"""The two kernels: baselines, and the steps of the search."""

from __future__ import annotations

import triton
import triton.language as tl

from hipserve.ops._triton import rows
from hipserve.ops._triton.chain import dependent_launch_signal, dependent_launch_wait
from hipserve.ops._triton.rows import kv_head_of, load_position, load_query_block
from hipserve.ops.select_blocks.triton.baseline import store_baselines
from hipserve.ops.select_blocks.triton.bound import search_bound
from hipserve.ops.select_blocks.triton.codes import coded_keys, coded_runs
from hipserve.ops.select_blocks.triton.far import far_keys
from hipserve.ops.select_blocks.triton.item import (
    Item,
    program_item,
    selected_blocks,
    wants_refresh,
)
from hipserve.ops.select_blocks.triton.queries import queries_of
from hipserve.ops.select_blocks.triton.scratch import query_codes_of, scratch_of, turned_rows_of
from hipserve.ops.select_blocks.triton.tree import search_tree


@triton.jit(do_not_specialize=["num_blocks"])
def baseline_kernel(
    q,
    q_strides,
    keys,
    block_table,
    table_stride,
    page_size,
    query_blocks,
    window_starts,
    baselines,
    arrivals,
    refresh,
    indices,
    query_codes,
    rope,
    turned,
    num_blocks,
    window_start,
    GEOMETRY: tl.constexpr,
    TILING: tl.constexpr,
):
    """Finds the baseline of each row: max over sinks and window of q k, as far as all rows see it.

    Also writes the window start and an empty list of chosen blocks, and resets the barrier.
    """
    dependent_launch_wait(TILING.chained)
    dependent_launch_signal(TILING.chained)
    item = program_item(num_blocks, TILING.baseline_programs, GEOMETRY)
    position = load_position(query_blocks, item.block)
    end = tl.load(window_starts + item.block)
    # It is never below 0: asked here, the block's numbers come with the flag and not after it.
    if not (wants_refresh(refresh, item.block) & (position >= 0)):
        return
    block = load_query_block(query_blocks, item.block)
    kv_head = kv_head_of(item.head, GEOMETRY)
    table = block_table + block.seq.to(tl.int64) * table_stride
    row = item.row.to(tl.int64)
    baselines += row * TILING.baseline_programs * TILING.rows * TILING.row_tiles
    arrivals += row
    part = tl.program_id(0) % TILING.baseline_programs
    codes = query_codes_of(*query_codes, row, part, GEOMETRY, TILING)
    q_strides = rows.RowStrides(*q_strides)
    far = far_keys(rope, block, end, GEOMETRY)
    turned = turned_rows_of(turned, row, TILING.baseline_programs, GEOMETRY, TILING)
    queries = queries_of(q, q_strides, block, item.head, baselines, codes, far, turned, GEOMETRY)
    rows_of_keys = coded_keys(*keys, kv_head, table, page_size)
    begin = GEOMETRY.spec.num_sink_tokens
    if part == 0:
        if item.head == 0:
            tl.store(window_start + item.block, end)
        tl.store(arrivals, 0)
        i = tl.arange(0, GEOMETRY.list_size)
        out = selected_blocks(indices, item, GEOMETRY)
        tl.store(out + i, tl.zeros_like(i) - 1, mask=i < GEOMETRY.spec.max_selected)
    if end > begin:
        store_baselines(queries, rows_of_keys, begin, end, position + 1, GEOMETRY, TILING)


@triton.jit(do_not_specialize=["num_blocks"])
def search_kernel(
    q,
    q_strides,
    keys,
    block_table,
    table_stride,
    page_size,
    query_blocks,
    window_starts,
    baselines,
    arrivals,
    refresh,
    indices,
    query_codes,
    rope,
    turned,
    num_blocks,
    bounds,
    scores,
    lists,
    head_blocks,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    GEOMETRY: tl.constexpr,
    TILING: tl.constexpr,
):
    """The steps [FIRST, END) of the selector's search; the last one writes the chosen blocks."""
    dependent_launch_wait(TILING.chained)
    item_id = program_item(num_blocks, TILING.search_programs, GEOMETRY)
    begin, end = GEOMETRY.spec.num_sink_tokens, tl.load(window_starts + item_id.block)
    if not (wants_refresh(refresh, item_id.block) & (end > begin)):
        return
    block = load_query_block(query_blocks, item_id.block)
    row = item_id.row.to(tl.int64)
    baselines += row * TILING.baseline_programs * TILING.rows * TILING.row_tiles
    kv_head = kv_head_of(item_id.head, GEOMETRY)
    table = block_table + block.seq.to(tl.int64) * table_stride
    codes = query_codes_of(*query_codes, row, 0, GEOMETRY, TILING)
    q_strides = rows.RowStrides(*q_strides)
    far = far_keys(rope, block, end, GEOMETRY)
    turned = turned_rows_of(turned, row, TILING.search_programs, GEOMETRY, TILING)
    head = item_id.head
    item = Item(
        queries=queries_of(q, q_strides, block, head, baselines, codes, far, turned, GEOMETRY),
        keys=coded_keys(*keys, kv_head, table, page_size),
        bounds=coded_runs(*bounds, kv_head, table, page_size),
        scratch=scratch_of(scores, lists, arrivals, row, GEOMETRY),
        begin=begin,
        end=end,
    )
    if GEOMETRY.spec.selector.name == "tree":
        search_tree(item, item_id, indices, GEOMETRY, TILING)
    else:
        search_bound(item, item_id, indices, head_blocks, FIRST, END, GEOMETRY, TILING)
