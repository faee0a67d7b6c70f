"""The warps that compute: a group of four takes the rows of a query block for one head.

The product with the values of a tile is started after the scores of the next one, and both work
while the softmax of the next is computed. The two groups take turns to start products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hipserve.ops.block_sparse_attention.triton.hopper.memory import tiles_of
from hipserve.ops.block_sparse_attention.triton.hopper.work import item_at, load_work, make_work


class State(NamedTuple):
    """The softmax of the tiles so far, for every row of a group; the last tile's values wait."""

    acc: Any
    """`[ROWS, DIM]` float32: sum of 2^(score - maximum) times value."""
    maximum: Any
    """`[ROWS]` float32: the maximum of q.k, -inf before the first visible key."""
    total: Any
    """`[ROWS]` float32: sum of 2^(score - maximum)."""
    p: Any
    """`[ROWS, KEYS]`: 2^(score - maximum) of the last tile, to be multiplied by its values."""


class Group(NamedTuple):
    """What the tiles of a group of warps share."""

    q_tile: Any
    """`[ROWS, DIM]` in shared memory."""
    k_tiles: Any
    v_tiles: Any
    """`[STAGES, KEYS, DIM]` in shared memory, both."""
    memory: Any
    work: Any
    scale: Any
    """Scores are in units of log2(e): sm_scale * log2(e)."""


@gluon.jit
def narrow(x, dtype: gl.constexpr):
    """x float32 in 16 bits, two numbers an instruction; Triton's own cast takes one at a time."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def fold(x):
    """`[ROWS, N // 2]`: the greater of the halves of each row of x `[ROWS, N]`."""
    halves = gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    a, b = gl.split(gl.permute(halves, (0, 2, 1)))
    return gl.maximum(a, b)


@gluon.jit
def row_maximum(s):
    """`[ROWS]` of s `[ROWS, KEYS]`; folded first, for a chain of comparisons a quarter as long."""
    return gl.convert_layout(gl.max(fold(fold(s)), axis=1), gl.SliceLayout(1, s.type.layout))


@gluon.jit
def hide(s, t, work, SHAPE: gl.constexpr):
    """Scores s `[ROWS, KEYS]` of the tile t, -inf where a row does not see a key."""
    n = t * SHAPE.keys + gl.arange(0, SHAPE.keys, gl.SliceLayout(0, s.type.layout))
    row = gl.arange(0, SHAPE.rows, gl.SliceLayout(1, s.type.layout))
    begin = work.sinks + work.chosen
    there = (n < work.end) & ((n < begin) | (n >= begin + work.hidden))
    visible = there[None, :] & (n[None, :] <= work.own + row[:, None])
    return gl.where(visible, s, -float("inf"))


@gluon.jit
def start_scores(group, stage, SHAPE: gl.constexpr):
    """Starts q k^T, `[ROWS, KEYS]` float32."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.keys, 16])
    s = gl.full([SHAPE.rows, SHAPE.keys], 0.0, gl.float32, layout)
    k_tile = group.k_tiles.index(stage).permute((1, 0))
    return warpgroup_mma(group.q_tile, k_tile, s, use_acc=False, is_async=True)


@gluon.jit
def soften(s, maximum, total, scale, MASKED: gl.constexpr):
    """p, the factor of what was summed before, and the new maximum and total.

    m' = max(m, s);  p = 2^(scale (s - m'));  factor = 2^(scale (m - m'));  l' = l factor + sum p
    """
    greatest = gl.maximum(maximum, row_maximum(s))
    shift = greatest * scale
    if MASKED:
        shift = gl.where(greatest == -float("inf"), 0.0, shift)
    p = gl.exp2(s * scale - shift[:, None])
    factor = gl.exp2(maximum * scale - shift)
    return p, factor, greatest, total * factor + gl.sum(p, axis=1)


@gluon.jit
def first_tile(group, t, count, W: gl.constexpr, SHAPE: gl.constexpr):
    """The `State` after the last tile of the list, the first to be read."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.head_dim, 16])
    STAGES: gl.constexpr = SHAPE.stages
    memory = group.memory
    stage, phase = count % STAGES, count // STAGES & 1
    mbarrier.wait(memory.k.full.index(stage), phase)
    s = warpgroup_mma_wait(0, deps=(start_scores(group, stage, SHAPE),))
    mbarrier.arrive(memory.k.empty.index(stage), count=1)
    if t == 0:
        mbarrier.arrive(memory.q.empty.index(W), count=1)
    s = hide(s, t, group.work, SHAPE)
    rows: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    maximum = gl.full([SHAPE.rows], -float("inf"), gl.float32, rows)
    total = gl.full([SHAPE.rows], 0.0, gl.float32, rows)
    p, _, maximum, total = soften(s, maximum, total, group.scale, True)
    p = gl.convert_layout(narrow(p, group.v_tiles.dtype), gl.DotOperandLayout(0, OUT, 2))
    acc = gl.full([SHAPE.rows, SHAPE.head_dim], 0.0, gl.float32, OUT)
    mbarrier.wait(memory.v.full.index(stage), phase)
    return State(acc, maximum, total, p)


@gluon.jit
def next_tile(
    state, group, t, count, turn, W: gl.constexpr, MASKED: gl.constexpr, SHAPE: gl.constexpr
):
    """The `State` after one tile more, number t of the list.

    The wait for the tile's values keeps the compiler from waiting for the products any earlier.
    """
    STAGES: gl.constexpr = SHAPE.stages
    memory = group.memory
    acc, maximum, total, p = state
    stage, before = count % STAGES, (count - 1) % STAGES
    mbarrier.wait(memory.k.full.index(stage), count // STAGES & 1)
    mbarrier.wait(memory.turns.index(W), turn & 1)
    s = start_scores(group, stage, SHAPE)
    acc = warpgroup_mma(p, group.v_tiles.index(before), acc, is_async=True)
    mbarrier.arrive(memory.turns.index(1 - W), count=1)
    s = warpgroup_mma_wait(1, deps=(s,))
    if t == 0:
        mbarrier.arrive(memory.q.empty.index(W), count=1)
    if MASKED:
        s = hide(s, t, group.work, SHAPE)
    fresh, factor, maximum, total = soften(s, maximum, total, group.scale, MASKED)
    fresh = narrow(fresh, group.v_tiles.dtype)
    mbarrier.wait(memory.v.full.index(stage), count // STAGES & 1)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(memory.k.empty.index(stage), count=1)
    mbarrier.arrive(memory.v.empty.index(before), count=1)
    fresh = gl.convert_layout(fresh, p.type.layout)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))
    return State(acc * factor[:, None], maximum, total, fresh)


@gluon.jit
def attend(group, tiles, whole, count, done, W: gl.constexpr, SHAPE: gl.constexpr):
    """The `State` after all tiles; those before the tile `whole` need no mask."""
    STAGES: gl.constexpr = SHAPE.stages
    state = first_tile(group, tiles - 1, count, W, SHAPE)
    for i in range(1, tiles - whole):
        turn = count + i - done - 1
        state = next_tile(state, group, tiles - 1 - i, count + i, turn, W, True, SHAPE)
    for i in range(tiles - whole, tiles):
        turn = count + i - done - 1
        state = next_tile(state, group, tiles - 1 - i, count + i, turn, W, False, SHAPE)
    last = (count + tiles - 1) % STAGES
    acc = warpgroup_mma(state.p, group.v_tiles.index(last), state.acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=(acc, state.p))
    mbarrier.arrive(group.memory.v.empty.index(last), count=1)
    return State(acc, state.maximum, state.total, p)


@gluon.jit
def store(state, item, work, scale, out, lse, W: gl.constexpr, SHAPE: gl.constexpr):
    """Writes the rows of one head; none of them where the pair has no second head."""
    LN2: gl.constexpr = 0.6931471805599453
    HEADS: gl.constexpr = SHAPE.heads * SHAPE.group_size
    total, acc = state.total, state.acc
    divisor = gl.where(total > 0, total, 1.0)
    logsum = (state.maximum * scale + gl.log2(divisor)) * LN2
    logsum = gl.where(total > 0, logsum, -float("inf"))
    row = gl.arange(0, SHAPE.rows, total.type.layout)
    head = 2 * item.pair + W
    keep = (row < work.num_rows) & (head < SHAPE.group_size)
    at = (work.first_row + row).to(gl.int64) * HEADS + item.head * SHAPE.group_size + head
    gl.store(lse + at, logsum, mask=keep)
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    d = gl.arange(0, SHAPE.head_dim, gl.SliceLayout(0, acc.type.layout))
    result = acc * gl.convert_layout(1.0 / divisor, rows)[:, None]
    to = out + gl.convert_layout(at, rows)[:, None] * SHAPE.head_dim + d[None, :]
    keep = gl.convert_layout(keep, rows)
    gl.store(to, result.to(out.dtype.element_ty), mask=keep[:, None])


@gluon.jit
def consume(memory, inputs, out, lse, scale, W: gl.constexpr, SHAPE: gl.constexpr):
    """Computes the head W of the pair of every item."""
    q_tiles = tiles_of(memory.q.pieces, 2, SHAPE.rows, SHAPE.head_dim)
    k_tiles = tiles_of(memory.k.pieces, SHAPE.stages, SHAPE.keys, SHAPE.head_dim)
    v_tiles = tiles_of(memory.v.pieces, SHAPE.stages, SHAPE.keys, SHAPE.head_dim)
    q_tile = q_tiles.index(W)
    count = 0
    done = 0
    coming = load_work(gl.program_id(0), inputs, SHAPE)
    for number in range(gl.program_id(0), inputs.items, inputs.programs):
        work = make_work(coming, SHAPE)
        coming = load_work(number + inputs.programs, inputs, SHAPE)
        tiles = gl.cdiv(work.end, SHAPE.keys)
        if tiles > 0:
            whole = gl.minimum((work.own + 1) // SHAPE.keys, tiles - 1)
            whole = gl.where(work.hidden > 0, 0, whole)
            group = Group(q_tile, k_tiles, v_tiles, memory, work, scale)
            mbarrier.wait(memory.q.full.index(W), done & 1)
            state = attend(group, tiles, whole, count, done, W, SHAPE)
            store(state, item_at(number, inputs, SHAPE), work, scale, out, lse, W, SHAPE)
            count += tiles
            done += 1
