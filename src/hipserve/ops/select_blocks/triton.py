"""Block selection in Triton: the search of `reference.py`, one launch a step, or one for all.

`rate_kernel` rates what rows read anyway. `search_kernel` scores the runs of each bound level and
keeps the best, from the coarsest runs to the keys themselves, keeps the best key blocks, and walks
the tree: in one launch for lone rows, else in one a step. Where query blocks are few, several
programs share the scores of each; they wait for each other (`_meet`) and each keeps for itself.
Every query block and head has a scratch row of its own, which stays in cache. Nothing is sorted:
`_keep_best` finds the count-th greatest score by cutting ranges and compacts in position order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipserve.errors import BackendError
from hipserve.ops.gather import follow, key_offsets, lead, load_tile, power_of_2
from hipserve.ops.select_blocks.spec import SearchSpec
from hipserve.plan import bound_levels, bound_offsets, kept_runs
from hipserve.platform import chains_launches, gpu_processors, logger

MAX_ROWS = 128
SCRATCH_BYTES = 256 * 2**20
PROGRAMS = 384
"""Fewer programs than this leave a large GPU idle: several share a query block and head."""
MAX_SHARERS = 16
LONG_LIST = 2**15
"""Lists of so many entries and more take minutes to compile."""
SIGN, GREATEST = tl.constexpr(2**31), tl.constexpr(2**32 - 1)


@dataclass(frozen=True)
class Tiling:
    """What a kernel is compiled for; all sizes count elements.

    `lengths`, `candidates` and `kept` hold one entry a bound level, finest first, `offsets` one
    more; `blocks` and `beam` are the most key blocks that the re-rank and the tree see, `list_size`
    the longest list, all (but `kept`) powers of two. `raters` and `searchers` are the programs of a
    query block and head; those take `keys` at a time, and `runs` at each bound level. A launch does
    `together` of the `steps` of a search: all of them for lone rows, whose time goes into launches
    and what they start with.
    """

    group_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dim: int
    rows: int
    row_tiles: int
    read_keys: int
    keys: int
    runs: tuple[int, ...]
    stages: int
    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    candidates: tuple[int, ...]
    kept: tuple[int, ...]
    blocks: int
    beam: int
    score_size: int
    list_size: int
    steps: int
    together: int
    raters: int
    searchers: int
    chained: bool

    @property
    def levels(self) -> int:
        return len(self.lengths)

    @property
    def ratio(self) -> int:
        """Fine runs in a coarse one."""
        return self.lengths[-1] // self.lengths[0]


@triton.jit
def _keep_best(scores, n, count, SIZE: tl.constexpr):
    """Which of the first `n` scores are the `count` greatest, and their places in order.

    Ties go to the lower index. The threshold is found by cutting its range in three, on integers
    that order as the scores do, until exactly `count` scores reach it; one sum of 32 bits, which a
    warp does in one instruction, carries both counts.
    """
    i = tl.arange(0, SIZE)
    there = i < n
    score = tl.load(scores + i, mask=there, other=0.0) + 0.0  # -0 and +0 are equal
    bits = score.to(tl.uint32, bitcast=True)
    key = tl.where(bits < SIGN, bits + SIGN, bits ^ GREATEST)
    PAIR: tl.constexpr = tl.int32 if SIZE < 2**15 else tl.int64
    HALF: tl.constexpr = 16 if SIZE < 2**15 else 32
    wanted = tl.minimum(count, n)
    low = tl.min(tl.where(there, key, GREATEST))  # the threshold lies in [low, low + span)
    span = tl.max(tl.where(there, key, 0)) - low + 1
    reached = n
    while (reached > wanted) & (span > 1):
        third = (span + 1) // 3
        first, second = low + third, low + 2 * third
        counts = (there & (key >= first)).to(PAIR)
        counts += (there & (key >= second)).to(PAIR) << HALF
        counts = tl.sum(counts, axis=0)
        one, two = (counts & ((1 << HALF) - 1)).to(tl.int32), (counts >> HALF).to(tl.int32)
        low = tl.where(two >= wanted, second, tl.where(one >= wanted, first, low))
        span = tl.where(two >= wanted, span - 2 * third, third)
        reached = tl.where(two >= wanted, two, tl.where(one >= wanted, one, reached))
    kept = there & (key >= low)
    if reached > wanted:
        equal = there & (key == low)
        rank = tl.cumsum(equal.to(tl.int32), 0)
        kept &= ~equal | (rank <= tl.sum(equal.to(tl.int32)) - (reached - wanted))
    return kept, tl.cumsum(kept.to(tl.int32), 0) - 1


@triton.jit
def _load_queries(queries, tile, STRIDE: tl.constexpr, TILING: tl.constexpr):
    """`[rows, dim]` sampled rows times heads of the group, and which of them exist."""
    q, row_stride, head_stride, num_rows = queries
    r = tile * TILING.rows + tl.arange(0, TILING.rows)
    row = num_rows - 1 - r // TILING.group_size * STRIDE
    valid = row >= 0
    place = q + row.to(tl.int64) * row_stride + r % TILING.group_size * head_stride
    return load_tile(place, valid, TILING.head_dim, TILING.dim), valid


@triton.jit
def _weigh_sides(q_tile, REACH: tl.constexpr):
    """What multiplies the maxima of a box and what its minima (`bound_reach`)."""
    NEAR: tl.constexpr = (1 + REACH) / 2
    FAR: tl.constexpr = (1 - REACH) / 2
    x = q_tile.to(tl.float32)
    to_high = tl.where(x > 0, x * NEAR, x * FAR)
    to_low = tl.where(x > 0, x * FAR, x * NEAR)
    return to_high.to(q_tile.dtype), to_low.to(q_tile.dtype)


@triton.jit
def _base(base, tile, TILING: tl.constexpr):
    """`[rows]`: what `rate_kernel` found for the rows of a tile, over all of its parts."""
    part = tl.arange(0, TILING.raters) * TILING.rows * TILING.row_tiles
    row = tile * TILING.rows + tl.arange(0, TILING.rows)
    return tl.max(tl.load(base + part[:, None] + row[None, :]), axis=0)


@triton.jit
def _greatest(first, queries, base, k_tile, STRIDE: tl.constexpr, TILING: tl.constexpr):
    """`[keys]`: each key's greatest score of any row, less that row's base.

    `first` is the first tile of queries and its base: mostly there is no other.
    """
    KEYS: tl.constexpr = TILING.keys
    best = tl.full([KEYS], -float("inf"), tl.float32)
    TILES: tl.constexpr = TILING.row_tiles
    for tile in tl.range(TILES, num_stages=1):
        q_tile, less = first
        if TILING.row_tiles > 1:
            q_tile, _ = _load_queries(queries, tile, STRIDE, TILING)
            less = _base(base, tile, TILING)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        best = tl.maximum(best, tl.max(s - less[None, :], axis=1))
    return best


@triton.jit
def _greatest_in_box(first, queries, base, high, low, SPEC: tl.constexpr, TILING: tl.constexpr):
    """`[runs]`: `_greatest` as the boxes [low, high] tell it."""
    best = tl.full([high.shape[0]], -float("inf"), tl.float32)
    TILES: tl.constexpr = TILING.row_tiles
    for tile in tl.range(TILES, num_stages=1):
        to_high, to_low, less = first
        if TILING.row_tiles > 1:
            q_tile, _ = _load_queries(queries, tile, SPEC.query_stride, TILING)
            to_high, to_low = _weigh_sides(q_tile, SPEC.bound_reach)
            less = _base(base, tile, TILING)
        s = tl.dot(high, tl.trans(to_high), input_precision="ieee")
        s = tl.dot(low, tl.trans(to_low), s, input_precision="ieee")
        best = tl.maximum(best, tl.max(s - less[None, :], axis=1))
    return best


@triton.jit
def _rate_read(queries, keys_at, base, begin, end, last, SPEC: tl.constexpr, TILING: tl.constexpr):
    """Writes each row's base: its greatest score among sinks and window, as far as all see it.

    A program of several looks at its part of the keys and writes its own base.
    """
    k, k_strides, table, page_size = keys_at
    part = tl.program_id(0) % TILING.raters
    KEYS: tl.constexpr = TILING.read_keys
    STEP: tl.constexpr = TILING.raters * TILING.read_keys
    ROWS: tl.constexpr = TILING.rows
    TILES: tl.constexpr = TILING.row_tiles
    for tile in tl.range(TILES, num_stages=1):
        q_tile, valid = _load_queries(queries, tile, SPEC.query_stride, TILING)
        top = tl.full([ROWS], -float("inf"), tl.float32)
        if not SPEC.relative_scores:
            top = tl.zeros([ROWS], tl.float32)
        else:
            for start in tl.range(part * KEYS, begin + last - end, STEP, num_stages=TILING.stages):
                n = start + tl.arange(0, KEYS)
                there = n < begin + last - end
                keys = tl.where(n < begin, n, end + n - begin)
                rows = k + key_offsets(k_strides, table, page_size, keys, there)
                k_tile = load_tile(rows, there, TILING.head_dim, TILING.dim)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                top = tl.maximum(top, tl.max(tl.where(there[None, :], s, -float("inf")), axis=1))
        row = (part * TILING.row_tiles + tile) * TILING.rows + tl.arange(0, TILING.rows)
        tl.store(base + row, tl.where(valid, top, float("inf")))


@triton.jit
def _run_of(c, runs, edges, RATIO: tl.constexpr):
    """Run of the c-th candidate of a level: before the kept parents, their children, behind."""
    begin, low, kept, high = edges
    inner = (c >= low) & (c < low + kept * RATIO)
    child = tl.load(runs + (c - low) // RATIO, mask=inner, other=0) * RATIO + (c - low) % RATIO
    outer = tl.where(c < low, begin + c, high + c - low - kept * RATIO)
    return tl.where(inner, child, outer)


@triton.jit
def _candidates(begin, end, kept, LEVEL: tl.constexpr, TILING: tl.constexpr):
    """What `_run_of` needs to tell the candidates of a level apart, and how many there are."""
    LENGTH: tl.constexpr = TILING.lengths[LEVEL]
    first = (begin + LENGTH - 1) // LENGTH
    behind = tl.maximum(first, end // LENGTH)
    low, high = behind, behind
    RATIO: tl.constexpr = TILING.ratio
    if TILING.levels - 1 > LEVEL:
        low = (begin + LENGTH * RATIO - 1) // (LENGTH * RATIO) * RATIO
        high = end // (LENGTH * RATIO) * RATIO
        parents = low < high
        low, high = tl.where(parents, low, behind), tl.where(parents, high, behind)
    before = tl.maximum(tl.minimum(low, behind) - first, 0)
    high = tl.maximum(high, first)
    return (first, before, kept, high), before + kept * RATIO + tl.maximum(behind - high, 0)


@triton.jit
def _scores_of(mine, LEVEL: tl.constexpr, TILING: tl.constexpr):
    """Where the scores of a level are: those of the next one may be written while they are read."""
    return mine[0] + (LEVEL + 1) % 2 * TILING.score_size


@triton.jit
def _runs_of(mine, LEVEL: tl.constexpr, TILING: tl.constexpr):
    return mine[1] + LEVEL % 2 * TILING.list_size


@triton.jit
def _count_kept(begin, end, kept, LEVEL: tl.constexpr, TILING: tl.constexpr):
    """How many runs of a level are kept, below `kept` runs of the level above."""
    KEEP: tl.constexpr = TILING.kept[LEVEL]
    _, n = _candidates(begin, end, kept, LEVEL, TILING)
    return tl.minimum(n, KEEP)


@triton.jit
def _keep_runs(mine, begin, end, kept, LEVEL: tl.constexpr, TILING: tl.constexpr):
    """Keeps the best candidates of a level, below `kept` runs of the level above, in order."""
    count = _count_kept(begin, end, kept, LEVEL, TILING)
    edges, n = _candidates(begin, end, kept, LEVEL, TILING)
    chosen, place = _keep_best(_scores_of(mine, LEVEL, TILING), n, count, TILING.candidates[LEVEL])
    c = tl.arange(0, TILING.candidates[LEVEL])
    run = _run_of(c, _runs_of(mine, LEVEL + 1, TILING), edges, TILING.ratio)
    tl.store(_runs_of(mine, LEVEL, TILING) + place, run, mask=chosen)
    tl.debug_barrier()


@triton.jit
def _score_runs(
    queries, keys_at, bounds_at, mine, begin, end, kept,
    LEVEL: tl.constexpr, SPEC: tl.constexpr, TILING: tl.constexpr,
):  # fmt: skip
    """Scores the candidates of a level by their boxes."""
    scores = _scores_of(mine, LEVEL, TILING)
    edges, n = _candidates(begin, end, kept, LEVEL, TILING)
    q_tile, _ = _load_queries(queries, 0, SPEC.query_stride, TILING)
    to_high, to_low = _weigh_sides(q_tile, SPEC.bound_reach)
    sides = (to_high, to_low, _base(mine[2], 0, TILING))
    RUNS: tl.constexpr = TILING.runs[LEVEL]
    first = tl.program_id(0) % TILING.searchers * RUNS
    STEP: tl.constexpr = TILING.searchers * RUNS
    i = tl.arange(0, RUNS)
    boxes = _boxes_of(first + i, n, edges, mine, keys_at, bounds_at, LEVEL, TILING)
    for start in tl.range(first, n, STEP, num_stages=1):
        c = start + i
        low_tile = load_tile(boxes, c < n, TILING.head_dim, TILING.dim)
        high_tile = load_tile(boxes + bounds_at[1][3], c < n, TILING.head_dim, TILING.dim)
        # What is next is looked up while these are on their way.
        boxes = _boxes_of(c + STEP, n, edges, mine, keys_at, bounds_at, LEVEL, TILING)
        best = _greatest_in_box(sides, queries, mine[2], high_tile, low_tile, SPEC, TILING)
        tl.store(scores + c, best, mask=c < n)


@triton.jit
def _boxes_of(c, n, edges, mine, keys_at, bounds_at, LEVEL: tl.constexpr, TILING: tl.constexpr):
    """Where the boxes of the candidates `c` are."""
    bounds, strides = bounds_at
    _, _, table, page_size = keys_at
    LENGTH: tl.constexpr = TILING.lengths[LEVEL]
    key = _run_of(c, _runs_of(mine, LEVEL + 1, TILING), edges, TILING.ratio) * LENGTH
    page = tl.load(table + key // page_size, mask=c < n, other=0).to(tl.int64)
    place = TILING.offsets[LEVEL] + key % page_size // LENGTH
    return bounds + page * strides[0] + place.to(tl.int64) * strides[1]


@triton.jit
def _score_keys(first, queries, base, k_tile, there, SPEC: tl.constexpr, TILING: tl.constexpr):
    """`[keys // key_block_size]`: the greatest score of each block of the keys in a tile."""
    best = _greatest(first, queries, base, k_tile, SPEC.query_stride, TILING)
    best = tl.where(there, best, -float("inf"))
    BLOCKS: tl.constexpr = TILING.keys // SPEC.key_block_size
    WIDTH: tl.constexpr = SPEC.key_block_size
    return tl.max(tl.reshape(best, [BLOCKS, WIDTH]), axis=1)


@triton.jit
def _keys_of(i, total, runs, keys_at, SIZE: tl.constexpr):
    """Where the i-th keys of the kept runs are."""
    k, k_strides, table, page_size = keys_at
    keys = tl.load(runs + i // SIZE, mask=i < total, other=0) * SIZE + i % SIZE
    return k + key_offsets(k_strides, table, page_size, keys, i < total)


@triton.jit
def _score_blocks(queries, keys_at, mine, kept, SPEC: tl.constexpr, TILING: tl.constexpr):
    """Scores the blocks in the kept runs by their keys."""
    SIZE: tl.constexpr = SPEC.bound_block_size
    BLOCKS: tl.constexpr = TILING.keys // SPEC.key_block_size
    scores, runs = _scores_of(mine, -1, TILING), _runs_of(mine, 0, TILING)
    total = kept * SIZE
    q_tile, _ = _load_queries(queries, 0, SPEC.query_stride, TILING)
    first = (q_tile, _base(mine[2], 0, TILING))
    begin = tl.program_id(0) % TILING.searchers * TILING.keys
    STEP: tl.constexpr = TILING.searchers * TILING.keys
    key = tl.arange(0, TILING.keys)
    rows = _keys_of(begin + key, total, runs, keys_at, SIZE)
    for start in range(begin, total, STEP):
        there = start + key < total
        k_tile = load_tile(rows, there, TILING.head_dim, TILING.dim)
        rows = _keys_of(start + STEP + key, total, runs, keys_at, SIZE)
        best = _score_keys(first, queries, mine[2], k_tile, there, SPEC, TILING)
        to = start // SPEC.key_block_size + tl.arange(0, BLOCKS)
        tl.store(scores + to, best, mask=to < total // SPEC.key_block_size)


@triton.jit
def _best_of_runs(scores, runs, found, kept, SPEC: tl.constexpr, TILING: tl.constexpr):
    """Leaves the best blocks of the kept runs, by their exact scores, in `found`."""
    PER_RUN: tl.constexpr = SPEC.bound_block_size // SPEC.key_block_size
    KEEP: tl.constexpr = SPEC.bound_budget // SPEC.key_block_size
    n = kept * PER_RUN
    c = tl.arange(0, TILING.blocks)
    block = tl.load(runs + c // PER_RUN, mask=c < n, other=0) * PER_RUN + c % PER_RUN
    if not SPEC.rerank:
        tl.store(found + c, block, mask=c < n)
        return n
    chosen, place = _keep_best(scores, n, KEEP, TILING.blocks)
    tl.store(found + place, block, mask=chosen)
    return tl.minimum(n, KEEP)


@triton.jit
def _mix(left, right, SEED: tl.constexpr):
    """A hash of a range, as `mix` in `reference.py`."""
    LOW: tl.constexpr = 0xFFFFFFFF
    x = left.to(tl.int64) * 0x9E3779B1 + right.to(tl.int64) * 0x85EBCA77
    x = (x + (SEED * 0xC2B2AE3D & LOW)) & LOW
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & LOW
    x = ((x ^ (x >> 12)) * 0x297A2D39) & LOW
    return (x ^ (x >> 15)) & 0x7FFFFFFF


@triton.jit
def _halves(c, nodes, n, stride):
    """Left and right edge of the c-th half: node c // 2, first or second half."""
    left = tl.load(nodes + c // 2, mask=c < n, other=0)
    right = tl.load(nodes + stride + c // 2, mask=c < n, other=0)
    middle = (left + right) // 2
    return tl.where(c % 2 == 0, left, middle), tl.where(c % 2 == 0, middle, right)


@triton.jit
def _representative(left, right, SPEC: tl.constexpr):
    if SPEC.representative == "first":
        return left
    elif SPEC.representative == "last":
        return right - 1
    elif SPEC.representative == "random":
        length = tl.maximum(right - left, 1).to(tl.int64)
        return left + (_mix(left, right, SPEC.seed) % length).to(tl.int32)
    else:
        return (left + right) // 2


@triton.jit
def _by_tree(
    queries, keys_at, base, scores, nodes, begin, end,
    SPEC: tl.constexpr, TILING: tl.constexpr,
):  # fmt: skip
    """The paper's beam (section 3): leaves the blocks in `nodes`, ascending; returns how many."""
    SIZE: tl.constexpr = SPEC.key_block_size
    BEAM: tl.constexpr = SPEC.tree_budget // SIZE
    BLOCKS: tl.constexpr = TILING.keys // SIZE
    stride: tl.constexpr = TILING.list_size
    head, count = begin // SIZE, end // SIZE - begin // SIZE
    i = tl.arange(0, TILING.beam)
    tl.store(nodes + i, (head + i.to(tl.int64) * count // BEAM).to(tl.int32), mask=i < BEAM)
    edge = (head + (i + 1).to(tl.int64) * count // BEAM).to(tl.int32)
    tl.store(nodes + stride + i, edge, mask=i < BEAM)
    tl.debug_barrier()
    q_tile, _ = _load_queries(queries, 0, SPEC.query_stride, TILING)
    first = (q_tile, _base(base, 0, TILING))
    longest = (count + BEAM - 1) // BEAM
    while longest > 1:
        for start in range(0, 2 * BEAM, BLOCKS):
            k = tl.arange(0, TILING.keys)
            c = start + k // SIZE
            left, right = _halves(c, nodes, 2 * BEAM, stride)
            block = _representative(left, right, SPEC)
            block = tl.minimum(tl.maximum(block, head), end // SIZE - 1)
            keys, there = block * SIZE + k % SIZE, c < 2 * BEAM
            rows = keys_at[0] + key_offsets(keys_at[1], keys_at[2], keys_at[3], keys, there)
            k_tile = load_tile(rows, there, TILING.head_dim, TILING.dim)
            best = _score_keys(first, queries, base, k_tile, there, SPEC, TILING)
            c = start + tl.arange(0, BLOCKS)
            left, right = _halves(c, nodes, 2 * BEAM, stride)
            best = tl.where(left < right, best, -float("inf"))
            tl.store(scores + c, best, mask=c < 2 * BEAM)
        tl.debug_barrier()
        chosen, place = _keep_best(scores, 2 * BEAM, BEAM, 2 * TILING.beam)
        left, right = _halves(tl.arange(0, 2 * TILING.beam), nodes, 2 * BEAM, stride)
        tl.debug_barrier()
        tl.store(nodes + place, left, mask=chosen)
        tl.store(nodes + stride + place, right, mask=chosen)
        tl.debug_barrier()
        longest = (longest + 1) // 2
    return BEAM


@triton.jit
def _lower_bound(list_, n, x, LOG: tl.constexpr):
    """How many of the first `n` ascending entries are less than each x."""
    low = tl.zeros_like(x)
    high = low + n
    for _ in range(LOG + 1):
        middle = (low + high) // 2
        less = tl.load(list_ + middle, mask=middle < n, other=0) < x
        go = low < high
        low = tl.where(go & less, middle + 1, low)
        high = tl.where(go & ~less, middle, high)
    return low


@triton.jit
def _unite(a, n, b, m, ranks, out, TILING: tl.constexpr):
    """Writes the union of two ascending lists, ascending and without repeats."""
    LOG: tl.constexpr = TILING.list_size.bit_length()
    i = tl.arange(0, TILING.list_size)
    from_b = tl.load(b + i, mask=i < m, other=0)
    below = _lower_bound(a, n, from_b, LOG)
    twin = tl.load(a + below, mask=below < n, other=-1) == from_b
    fresh = (i < m) & ~twin
    rank = tl.cumsum(fresh.to(tl.int32), 0)
    tl.store(ranks + i, rank - fresh.to(tl.int32))
    tl.store(out + below + rank - 1, from_b, mask=fresh)
    tl.debug_barrier()
    from_a = tl.load(a + i, mask=i < n, other=0)
    above = _lower_bound(b, m, from_a, LOG)
    all_fresh = tl.sum(fresh.to(tl.int32))
    rank = tl.load(ranks + above, mask=(i < n) & (above < m), other=0)
    tl.store(out + i + tl.where(above < m, rank, all_fresh), from_a, mask=i < n)


@triton.jit
def _item(blocks, PROGRAMS: tl.constexpr, TILING: tl.constexpr):
    """Scratch row, query block and head of this program.

    One head after the other, as its query blocks read the same keys; the last blocks, which see
    most, come first.
    """
    item, count = tl.program_id(0) // PROGRAMS, tl.num_programs(0) // (PROGRAMS * TILING.heads)
    return item, blocks[1] - 1 - item % count, item // count


@triton.jit
def _open(q, k, pages, blocks, scratch, item, block, head, TILING: tl.constexpr):
    """What the programs of one query block and head start from: queries, keys, scratch row.

    The programs that share one follow each other, so that they run together.
    """
    query_blocks, _, _ = blocks
    q, q_strides = q
    k, k_strides = k
    block_table, table_stride, page_size = pages
    seq = tl.load(query_blocks + 4 * block)
    row = tl.load(query_blocks + 4 * block + 1).to(tl.int64)
    num_rows = tl.load(query_blocks + 4 * block + 2)
    rows = q + row * q_strides[0] + (head * TILING.group_size).to(tl.int64) * q_strides[1]
    kv_head = (head * TILING.kv_heads // TILING.heads).to(tl.int64)
    table = block_table + seq.to(tl.int64) * table_stride
    keys_at = (k + kv_head * k_strides[2], k_strides, table, page_size)
    scores, lists, base, met = scratch
    item = item.to(tl.int64)
    scores += item * 2 * TILING.score_size
    lists += item * 5 * TILING.list_size
    base += item * TILING.raters * TILING.rows * TILING.row_tiles
    queries = (rows, q_strides[0], q_strides[1], num_rows)
    return kv_head, queries, keys_at, (scores, lists, base, met + item)


@triton.jit
def _due(refresh, block):
    """The query block selects afresh: always, or as a flag on the device says."""
    due = True
    if refresh is not None:
        due = tl.load(refresh + block) != 0
    return due


@triton.jit
def _meet(met, times, TILING: tl.constexpr):
    """Waits until all programs that share the search were here so many times.

    They all run at once: they follow each other, a GPU starts programs in order, and there are
    never more of them than it has processors.
    """
    tl.debug_barrier()
    if TILING.searchers > 1:
        tl.atomic_add(met, 1, sem="release")
        while tl.atomic_add(met, 0, sem="acquire") < times * TILING.searchers:
            pass
        tl.debug_barrier()


@triton.jit
def rate_kernel(
    q, k, pages, blocks, scratch, refresh, indices, window_start,
    SPEC: tl.constexpr, TILING: tl.constexpr,
):  # fmt: skip
    """Window, empty list, and each row's base."""
    follow(TILING.chained)
    lead(TILING.chained)
    item, block, head = _item(blocks, TILING.raters, TILING)
    position, end = tl.load(blocks[0] + 4 * block + 3), tl.load(blocks[2] + block)
    # It is never below 0: asked here, the block's numbers come with the flag and not after it.
    if not (_due(refresh, block) & (position >= 0)):
        return
    _, queries, keys_at, mine = _open(q, k, pages, blocks, scratch, item, block, head, TILING)
    begin = SPEC.num_sink_tokens
    if tl.program_id(0) % TILING.raters == 0:
        if head == 0:
            tl.store(window_start + block, end)
        tl.store(mine[3], 0)
        out = indices + (block.to(tl.int64) * TILING.heads + head) * SPEC.max_selected
        i = tl.arange(0, TILING.list_size)
        tl.store(out + i, tl.zeros_like(i) - 1, mask=i < SPEC.max_selected)
    if end > begin:
        _rate_read(queries, keys_at, mine[2], begin, end, position + 1, SPEC, TILING)


@triton.jit
def search_kernel(
    q, k, pages, blocks, scratch, refresh, indices, bounds,
    FIRST: tl.constexpr, END: tl.constexpr, SPEC: tl.constexpr, TILING: tl.constexpr,
):  # fmt: skip
    """The steps [FIRST, END) of a search; the last one writes the chosen blocks.

    Each of the others keeps the best of what the one before it scored, and scores what is in them:
    runs of the next bound level, or at last keys.
    """
    follow(TILING.chained)
    item, block, head = _item(blocks, TILING.searchers, TILING)
    begin, end = SPEC.num_sink_tokens, tl.load(blocks[2] + block)
    if not (_due(refresh, block) & (end > begin)):
        return
    kv_head, queries, keys_at, mine = _open(q, k, pages, blocks, scratch, item, block, head, TILING)
    bounds_at = (bounds[0] + kv_head * bounds[1][2], bounds[1])
    kept = 0
    LEVELS: tl.constexpr = TILING.levels
    for n in tl.static_range(LEVELS):
        if n >= FIRST and n < END:
            _score_runs(
                queries, keys_at, bounds_at, mine, begin, end, kept, LEVELS - 1 - n, SPEC, TILING
            )
            if n + 1 < END:
                _meet(mine[3], n + 1, TILING)
        if n + 1 >= FIRST and n + 1 < END:
            _keep_runs(mine, begin, end, kept, LEVELS - 1 - n, TILING)
        kept = _count_kept(begin, end, kept, LEVELS - 1 - n, TILING)
    STEPS: tl.constexpr = TILING.steps
    if FIRST <= STEPS - 2 and STEPS - 2 < END and STEPS > LEVELS + 1:
        _score_blocks(queries, keys_at, mine, kept, SPEC, TILING)
        if STEPS == END:
            _meet(mine[3], LEVELS + 1, TILING)
    if STEPS == END:
        if tl.program_id(0) % TILING.searchers == 0:
            out = indices + (block.to(tl.int64) * TILING.heads + head) * SPEC.max_selected
            _choose(queries, keys_at, mine, begin, end, kept, out, SPEC, TILING)


@triton.jit
def _choose(
    queries, keys_at, mine, begin, end, kept, out, SPEC: tl.constexpr, TILING: tl.constexpr
):
    """Writes the chosen blocks: the best of the kept runs, what the tree finds, or both."""
    scores, lists, base, _ = mine
    if SPEC.uses_bounds:
        found = out if SPEC.selector == "bound" else lists + 4 * TILING.list_size
        exact = _scores_of(mine, -1, TILING)
        n = _best_of_runs(exact, _runs_of(mine, 0, TILING), found, kept, SPEC, TILING)
        tl.debug_barrier()
    if SPEC.uses_tree:
        nodes = lists + 2 * TILING.list_size
        m = _by_tree(queries, keys_at, base, scores, nodes, begin, end, SPEC, TILING)
        if SPEC.uses_bounds:
            _unite(found, n, nodes, m, lists, out, TILING)
        else:
            i = tl.arange(0, TILING.list_size)
            chosen = tl.load(nodes + i, mask=i < m, other=-1)
            tl.store(out + i, chosen, mask=i < SPEC.max_selected)


def select_blocks(
    q: Tensor,
    k_cache: Tensor,
    k_bounds: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    spec: SearchSpec,
) -> Tensor:
    """See `hipserve.ops.select_blocks`; returns `indices`."""
    heads = k_cache.shape[2] if spec.share_group else q.shape[1]
    shape = (query_blocks.shape[0], heads, spec.max_selected)
    indices = torch.empty(shape, dtype=torch.int32, device=q.device)
    tensors = (q, k_cache, k_bounds, block_table, query_blocks, window_starts)
    refresh_blocks(*tensors, spec, None, indices, window_starts)
    return indices


def refresh_blocks(
    q: Tensor,
    k_cache: Tensor,
    k_bounds: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    spec: SearchSpec,
    refresh: Tensor | None,
    indices: Tensor,
    window_start: Tensor,
) -> None:
    """Selects in place, for the query blocks whose entry in `refresh` (int32) is not 0.

    Launches depend on shapes alone, so a call can be captured into a CUDA graph.
    """
    size = spec.key_block_size
    if size & (size - 1):
        raise BackendError(
            f"the Triton kernels need a key_block_size that is a power of two, not {size}; "
            'change it or use backend="reference"'
        )
    heads, blocks = indices.shape[1], query_blocks.shape[0]
    longest = block_table.shape[1] * k_cache.shape[1]
    num_runs = 0 if k_bounds is None else k_bounds.shape[1]
    tiling = make_tiling(
        q.shape, k_cache.shape, num_runs, longest, blocks, heads, spec, q.element_size(), q.device
    )
    scratch_of = {
        torch.float32: (2 * tiling.score_size, tiling.raters * tiling.rows * tiling.row_tiles),
        torch.int32: (5 * tiling.list_size, 1),
    }
    per_block = heads * 4 * sum(map(sum, scratch_of.values()))
    chunk = min(max(SCRATCH_BYTES // per_block, 1), blocks)
    (scores, base), (lists, met) = (
        [torch.empty(chunk * heads * size, dtype=dtype, device=q.device) for size in sizes]
        for dtype, sizes in scratch_of.items()
    )
    bounds = (q, (0, 0, 0, 0)) if k_bounds is None else (k_bounds, k_bounds.stride()[:4])
    options = {"SPEC": spec, "TILING": tiling, "launch_pdl": tiling.chained}
    wide = tiling.rows > 16 and (tiling.dim > 128 or tiling.row_tiles > 1)
    for end in range(blocks, 0, -max(chunk, 1)):
        items = min(chunk, end) * heads
        inputs = (
            (q, q.stride()[:2]),
            (k_cache, k_cache.stride()[:3]),
            (block_table, block_table.stride(0), k_cache.shape[1]),
            (query_blocks, end, window_starts),
            (scores, lists, base, met),
            refresh,
            indices,
        )
        rate_kernel[(items * tiling.raters,)](
            *inputs, window_start, num_warps=8 if wide else 4, **options
        )
        for step in range(0, tiling.steps, tiling.together):
            search_kernel[(items * tiling.searchers,)](
                *inputs,
                bounds,
                num_stages=tiling.stages,
                FIRST=step,
                END=step + tiling.together,
                num_warps=8 if wide else 4,
                **options,
            )


@functools.cache
def _say_how_long(entries: int, budget: int, rerank: int, page_size: int) -> None:
    """Nobody waits for minutes without knowing why."""
    if entries >= LONG_LIST:
        logger.warning(
            "kernels that search lists of %d entries compile for minutes (budget=%d, rerank=%d, "
            "pages of %d keys); with some thousand keys in pages of 256 it is seconds",
            entries,
            budget,
            rerank,
            page_size,
        )


@functools.lru_cache(1024)
def make_tiling(
    q_shape: torch.Size,
    k_shape: torch.Size,
    num_runs: int,
    longest: int,
    blocks: int,
    heads: int,
    spec: SearchSpec,
    element_size: int,
    device: torch.device,
) -> Tiling:
    """Sizes of the launch, from shapes alone; `longest` is what a row of the block table holds."""
    tokens, num_q_heads, head_dim = q_shape
    _, page_size, kv_heads, _ = k_shape
    group, dim = num_q_heads // heads, power_of_2(head_dim)
    max_rows = min(spec.query_block_size, tokens - blocks + 1)
    stacked = ((max_rows - 1) // spec.query_stride + 1) * group
    rows = max(min(most_rows(dim, element_size), power_of_2(stacked)), 16)
    sizes = (page_size, spec.bound_block_size, num_runs)
    lengths = bound_levels(*sizes) if spec.uses_bounds else ()
    keep = spec.bound_budget * max(spec.rerank, 1)
    kept = kept_runs(keep, lengths) if lengths else ()
    counts = [power_of_2(max(longest // length, 1)) for length in lengths[-1:]]
    if len(lengths) > 1:
        ratio = lengths[1] // lengths[0]
        counts.insert(0, ratio * (kept[1] + 2))  # what parents leave at both ends
    candidates = tuple(map(power_of_2, counts))
    blocks_seen = power_of_2(max(keep // spec.key_block_size, 1))
    beam = power_of_2(max(spec.tree_budget // spec.key_block_size, 1))
    few = max(PROGRAMS // max(blocks * heads, 1), 1)
    few = min(few, MAX_SHARERS, gpu_processors(device))
    keys, most, read_keys, stages = tile_keys(dim, rows, -(-stacked // rows))
    keys = max(keys, spec.key_block_size)
    shares = [keep // keys * (spec.rerank > 0), *(count // most for count in counts)]
    searchers = max(min(few, max(shares)), 1) if lengths else 1
    runs = [tile_runs(count, most, searchers) if rows == 16 else most for count in counts]
    steps = len(lengths) + (2 if lengths and spec.rerank else 1)
    score_size = max([*candidates, blocks_seen, 2 * beam])
    list_size = power_of_2(max([*kept, blocks_seen, beam, spec.max_selected]))
    _say_how_long(max(score_size, list_size), spec.budget, spec.rerank, page_size)
    return Tiling(
        group,
        heads,
        kv_heads,
        head_dim,
        dim,
        rows,
        -(-stacked // rows),
        read_keys,
        keys,
        tuple(runs),
        stages,
        tuple(lengths),
        bound_offsets(*sizes),
        candidates,
        kept,
        blocks_seen,
        beam,
        score_size,
        list_size,
        steps,
        steps if max_rows == 1 else 1,
        min(power_of_2(few // 2 + 1), 8),
        searchers,
        chains_launches(device),
    )


def most_rows(dim: int, element_size: int) -> int:
    """Rows of a tile, at most: both sides of a box and the rows that meet it share the memory."""
    if dim > 256:
        return 64 // element_size
    return MAX_ROWS if dim <= 128 else MAX_ROWS // 2


def tile_runs(count: int, most: int, sharers: int) -> int:
    """Runs of a tile, `most` or half: with which the busiest program that shares does less."""
    return min((most, most // 2), key=lambda runs: -(-count // (runs * sharers)) * runs)


def tile_keys(dim: int, rows: int, row_tiles: int) -> tuple[int, int, int, int]:
    """Keys of a tile in the search, most runs, keys read anyway; pipeline depth of the first.

    As `benchmarks/gpu.py tune` found them.
    """
    if dim > 256:  # not measured: fits every GPU, without spills
        return 16, 16, 16, 1
    if dim > 128:
        return 32, 32, 32, 1
    if row_tiles > 1:
        return 64, 64, 64, 1
    if rows == 16:
        return 128, 64, 128, 1
    return 128, 64, 32, 2
