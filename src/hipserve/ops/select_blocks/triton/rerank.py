"""The re-rank: blocks in the runs that the bounds kept, by the exact scores of their keys."""

from __future__ import annotations

import triton
import triton.language as tl

from hipserve.ops.select_blocks.triton.far import greatest_shift, shift_of
from hipserve.ops.select_blocks.triton.key_score import (
    best_of_blocks,
    key_rows,
    load_keys,
    score_keys,
)
from hipserve.ops.select_blocks.triton.queries import load_queries
from hipserve.ops.select_blocks.triton.scratch import level_runs
from hipserve.ops.select_blocks.triton.threshold import keep_best


@triton.jit
def run_positions(i, total, item, SIZE: tl.constexpr):
    """Positions of the i-th of all `total` keys in the kept finest runs, of SIZE keys each."""
    runs = level_runs(item.scratch, 0)
    # like i
    return tl.load(runs + i // SIZE, mask=i < total, other=0) * SIZE + i % SIZE


@triton.jit
def score_kept(item, kept, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """Scores the blocks in the `kept` finest runs, with the programs that share them."""
    SIZE: tl.constexpr = GEOMETRY.spec.run_size
    WIDTH: tl.constexpr = GEOMETRY.spec.key_block_size
    BLOCKS: tl.constexpr = TILING.keys // WIDTH
    STEP: tl.constexpr = TILING.search_programs * TILING.keys
    total = kept * SIZE
    queries = load_queries(item.queries, 0, 0, GEOMETRY, TILING)
    begin = tl.program_id(0) % TILING.search_programs * TILING.keys
    i = tl.arange(0, TILING.keys)
    positions = run_positions(begin + i, total, item, SIZE)
    rows = key_rows(item.keys, positions, begin + i < total, GEOMETRY)
    for start in range(begin, total, STEP):
        there = start + i < total
        k_tile = load_keys(rows, there, GEOMETRY)
        # What is next is looked up while these are on their way.
        c = start + STEP + i
        positions = run_positions(c, total, item, SIZE)
        rows = key_rows(item.keys, positions, c < total, GEOMETRY)
        best = score_keys(queries, item.queries, 0, k_tile, GEOMETRY, TILING)
        best = best_of_blocks(best, there, GEOMETRY, TILING)
        block = start // WIDTH + tl.arange(0, BLOCKS)
        tl.store(item.scratch.block_scores + block, best, mask=block < total // WIDTH)  # [BLOCKS]


@triton.jit
def score_far_kept(item, kept, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`score_kept` where far keys are seen nearer: kept runs ascend, so those of one segment follow
    each other, and the query rows are turned once for all of them."""
    SIZE: tl.constexpr = GEOMETRY.spec.run_size
    WIDTH: tl.constexpr = GEOMETRY.spec.key_block_size
    KEYS: tl.constexpr = TILING.keys
    share = tl.cdiv(kept, TILING.search_programs) * SIZE
    start = tl.program_id(0) % TILING.search_programs * share
    end = tl.minimum(start + share, kept * SIZE)
    i = tl.arange(0, KEYS)
    positions = run_positions(start + i, end, item, SIZE)
    rows = key_rows(item.keys, positions, start + i < end, GEOMETRY)
    while start < end:
        far = item.queries.far
        shift = greatest_shift(far, positions // WIDTH * WIDTH, start + i < end, GEOMETRY)
        queries = load_queries(item.queries, 0, shift, GEOMETRY, TILING)
        seen = shift
        while seen == shift:
            to = item.scratch.block_scores + start // WIDTH + tl.arange(0, KEYS // WIDTH)
            same = shift_of(far, positions // WIDTH * WIDTH, GEOMETRY) == shift
            same &= start + i < end
            k_tile = load_keys(rows, same, GEOMETRY)
            # What is next is looked up while these are on their way.
            count = tl.sum(same.to(tl.int32), axis=0)
            start += count
            positions = run_positions(start + i, end, item, SIZE)
            rows = key_rows(item.keys, positions, start + i < end, GEOMETRY)
            seen = greatest_shift(far, positions // WIDTH * WIDTH, start + i < end, GEOMETRY)
            best = score_keys(queries, item.queries, shift, k_tile, GEOMETRY, TILING)
            best = best_of_blocks(best, same, GEOMETRY, TILING)
            tl.store(to, best, mask=tl.arange(0, KEYS // WIDTH) < count // WIDTH)


@triton.jit
def choose_in_runs(item, kept, wanted, out, GEOMETRY: tl.constexpr):
    """Writes the best `wanted` blocks of the kept runs to `out`, ascending."""
    SPEC: tl.constexpr = GEOMETRY.spec
    PER_RUN: tl.constexpr = GEOMETRY.spec.run_size // SPEC.key_block_size
    n = kept * PER_RUN
    c = tl.arange(0, GEOMETRY.blocks)
    run = tl.load(level_runs(item.scratch, 0) + c // PER_RUN, mask=c < n, other=0)  # [BLOCKS]
    block = run * PER_RUN + c % PER_RUN
    if not GEOMETRY.options.rerank:
        tl.store(out + c, block, mask=c < n)
    else:
        chosen, index = keep_best(item.scratch.block_scores, n, wanted, GEOMETRY.blocks)
        tl.store(out + index, block, mask=chosen)
