"""The warps that copy: query rows, and keys or values of the list, from its end to its start.

Each copy is one instruction for 16 keys, a box of the page that they lie in. Rows of the box that
lie outside the page become zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from hipserve.ops.block_sparse_attention.triton.hopper.memory import HALF, RUN
from hipserve.ops.block_sparse_attention.triton.hopper.work import (
    chosen_blocks,
    item_at,
    load_work,
    make_work,
)


@gluon.jit
def places_of(work, blocks, table, first, SHAPE: gl.constexpr):
    """`[32]` int32, a run a lane: where the runs from number `first` of the list on lie.

    `page * 2 * runs of a page + run in the page`, which for runs behind the list is outside it.
    """
    PER_PAGE: gl.constexpr = SHAPE.page_size // RUN
    SIZE: gl.constexpr = SHAPE.key_block_size // RUN
    run = first + gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    there = run * RUN < work.end
    position = run
    if SHAPE.selected:
        chosen = work.chosen // RUN
        after = run - work.sinks // RUN
        inside = there & (after >= 0) & (after < chosen)
        block = gl.load(blocks + after // SIZE, mask=inside, other=0)  # [32]
        position = gl.where(after < 0, run, work.window // RUN + after - chosen)
        position = gl.where(inside, block * SIZE + after % SIZE, position)
    page = gl.load(table + position // PER_PAGE, mask=there, other=0)  # [32]
    return gl.where(there, page * (2 * PER_PAGE) + position % PER_PAGE, PER_PAGE)


class Moved(NamedTuple):
    """The runs at the start of a list that were turned before, `turned.py`."""

    desc: Any
    row: Any
    """Where those of this item lie."""
    runs: Any
    """How many there are; 0 for values, which nothing turns."""


@gluon.jit
def copy_tile(desc, moved, bar, pieces, stage, places, tile, head, SHAPE: gl.constexpr):
    """Copies tile number `tile` of the list, whose runs are in the lanes; `bar` becomes full."""
    RUNS: gl.constexpr = SHAPE.keys // RUN
    HALVES: gl.constexpr = SHAPE.head_dim // HALF
    PER_PAGE: gl.constexpr = SHAPE.page_size // RUN
    lane = gl.arange(0, 32, places.type.layout)
    first = tile * RUNS
    mbarrier.expect(bar, SHAPE.keys * SHAPE.head_dim * 2)
    for j in gl.static_range(RUNS):
        place = gl.sum(gl.where(lane == (first + j) % 32, places, 0), axis=0)
        page, slot = place // (2 * PER_PAGE), place % (2 * PER_PAGE) * RUN
        for half in gl.static_range(HALVES):
            piece = pieces.index(stage * (HALVES * RUNS) + half * RUNS + j)
            if SHAPE.streams:
                if first + j < moved.runs:
                    at = [moved.row, (first + j) * RUN, 0, half * HALF]
                    tma.async_copy_global_to_shared(moved.desc, at, bar, piece)
                else:
                    at = [page, slot, head, half * HALF]
                    tma.async_copy_global_to_shared(desc, at, bar, piece)
            else:
                at = [page, slot, head, half * HALF]
                tma.async_copy_global_to_shared(desc, at, bar, piece)


@gluon.jit
def copy_rows(desc, q, first_row, head, done, W: gl.constexpr, SHAPE: gl.constexpr):
    """Copies the query rows of one head for the group W of consumers, once the last are read."""
    HALVES: gl.constexpr = SHAPE.head_dim // HALF
    bar = q.full.index(W)
    mbarrier.wait(q.empty.index(W), (done & 1) ^ 1)
    mbarrier.expect(bar, SHAPE.rows * SHAPE.head_dim * 2)
    for half in gl.static_range(HALVES):
        at = [first_row, head, half * HALF]
        tma.async_copy_global_to_shared(desc, at, bar, q.pieces.index(W * HALVES + half))


@gluon.jit
def clear_behind(pieces, stage, end, SHAPE: gl.constexpr):
    """Zeros in place of the values behind the list: weights of 0 do not hide what is no number."""
    RUNS: gl.constexpr = SHAPE.keys // RUN
    HALVES: gl.constexpr = SHAPE.head_dim // HALF
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    runs = pieces._reinterpret(pieces.dtype, [pieces.shape[0], RUN, HALF], flat)
    row = gl.arange(0, RUN, gl.SliceLayout(1, layout))
    for half in gl.static_range(HALVES):
        run = runs.index(stage * (HALVES * RUNS) + half * RUNS + end % SHAPE.keys // RUN)
        values = run.load(layout)
        run.store(gl.where((row < end % RUN)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def produce(q_desc, desc, turned, memory, inputs, VALUES: gl.constexpr, SHAPE: gl.constexpr):
    """Fills the tiles of keys, and those of query rows, or the tiles of values."""
    TILES: gl.constexpr = 32 * RUN // SHAPE.keys
    STAGES: gl.constexpr = SHAPE.stages
    target = memory.v if VALUES else memory.k
    count = 0
    done = 0
    repaired = 0
    for number in range(gl.program_id(0), inputs.items, inputs.programs):
        item = item_at(number, inputs, SHAPE)
        loaded = load_work(number, inputs, SHAPE)
        work = make_work(loaded, SHAPE)
        blocks = chosen_blocks(item, inputs, SHAPE)
        table = inputs.block_table + loaded.seq * inputs.table_stride
        kv_head = item.head * SHAPE.kv_heads // SHAPE.heads
        tiles = gl.cdiv(work.end, SHAPE.keys)
        moved = 0 if VALUES else gl.cdiv(work.sinks + work.chosen, RUN)
        moved = Moved(turned, item.block * SHAPE.heads + item.head, moved)
        places = gl.full([32], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
        for i in range(tiles):
            t = tiles - 1 - i
            if (i == 0) | (t % TILES == TILES - 1):
                places = places_of(work, blocks, table, t // TILES * 32, SHAPE)
            stage = count % STAGES
            mbarrier.wait(target.empty.index(stage), (count // STAGES & 1) ^ 1)
            if VALUES:
                cut = (i == 0) & (work.end % RUN != 0)
                bar = target.full.index(gl.where(cut, STAGES, stage))
                copy_tile(desc, moved, bar, target.pieces, stage, places, t, kv_head, SHAPE)
                if cut:
                    mbarrier.wait(bar, repaired & 1)
                    repaired += 1
                    clear_behind(target.pieces, stage, work.end, SHAPE)
                    mbarrier.arrive(target.full.index(stage), count=1)
            else:
                bar = target.full.index(stage)
                copy_tile(desc, moved, bar, target.pieces, stage, places, t, kv_head, SHAPE)
                if i == 0:
                    head = item.head * SHAPE.group_size + 2 * item.pair
                    for w in gl.static_range(2):
                        copy_rows(q_desc, memory.q, work.first_row, head + w, done, w, SHAPE)
            count += 1
        done += gl.where(tiles > 0, 1, 0)
