"""Block-sparse attention in Triton: one kernel for prefill and decode, one to join split keys.

A program takes some stacked rows of one query block (query rows times the heads of the GQA group)
and walks the keys that the block reads, SINK + chosen + WINDOW in position order, as one list. The
last `num_rows` keys of that list are the block's own, so that key n is visible to row i exactly if
n <= total - num_rows + i: only the tiles at the end need a mask.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipserve.ops.gather import follow, key_offsets, load_tile, power_of_2
from hipserve.platform import chains_launches, gpu_shared_memory

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MAX_ROWS = 256
WIDE_BYTES = 200_000
"""Shared memory of a Hopper GPU: room for 256 rows and two stages of 64 keys, or 128 and 128."""
PROGRAMS = 384
"""Fewer programs than this leave a large GPU idle: their keys are split."""
DENSE_PROGRAMS = 512
"""The same for the few rows (up to three with 8 KV heads) that read everything."""
SMALL_PROGRAMS = 832
"""The same for small programs, of one warp and 32 keys at a time."""
FEW_SPLITS = 16
MAX_SPLITS = 64


@dataclass(frozen=True)
class Tiling:
    """What a kernel is compiled for; all sizes count elements. A small program has one warp."""

    group_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dim: int
    rows: int
    keys: int
    row_tiles: int
    splits: int
    small: bool
    num_sink_tokens: int
    key_block_size: int
    max_selected: int
    selected: bool
    windowed: bool
    capped: bool
    same_strides: bool
    chained: bool


@triton.jit
def _list_position(n, sink, chosen, window, chosen_blocks, SIZE: tl.constexpr):
    """Position of the n-th key of the list: sinks, chosen blocks, window."""
    inside = (n >= sink) & (n < sink + chosen)
    block = tl.load(chosen_blocks + (n - sink) // SIZE, mask=inside, other=0)
    recent = tl.where(n < sink, n, window + n - sink - chosen)
    return tl.where(inside, block * SIZE + (n - sink) % SIZE, recent)


@triton.jit
def _scores(q_tile, k_tile, sm_scale, softcap, CAPPED: tl.constexpr):
    """Scaled scores in units of log2(e), `[rows, keys]` float32."""
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    if CAPPED:
        e = tl.exp2(tl.abs(s) * (-2 * LOG2E * sm_scale / softcap))
        t = (1 - e) / (1 + e)
        return tl.where(s * sm_scale < 0, -t, t) * (softcap * LOG2E)
    return s * (sm_scale * LOG2E)


@triton.jit
def _attend(
    state, q_tile, keys_at, start, listed, rows, numbers, MASKED: tl.constexpr, TILING: tl.constexpr
):
    """One tile of keys through the online softmax; the running maximum is in units of log2(e)."""
    acc, best, total = state
    k, k_strides, v, v_strides, table, page_size = keys_at
    end, sink, chosen, window, chosen_blocks = listed
    sm_scale, softcap, sliding_window = numbers
    n = start + tl.arange(0, TILING.keys)
    there = n < end
    keys = _list_position(n, sink, chosen, window, chosen_blocks, TILING.key_block_size)
    offsets = key_offsets(k_strides, table, page_size, keys, there, MASKED)
    k_rows, v_rows = k + offsets, v + offsets
    if not TILING.same_strides:
        v_rows = v + key_offsets(v_strides, table, page_size, keys, there, MASKED)
    k_tile = load_tile(k_rows, there, TILING.head_dim, TILING.dim, MASKED)
    v_tile = load_tile(v_rows, there, TILING.head_dim, TILING.dim, MASKED)
    s = _scores(q_tile, k_tile, sm_scale, softcap, TILING.capped)
    if MASKED:
        last_seen, position = rows
        visible = there[None, :] & (n[None, :] <= last_seen[:, None])
        if TILING.windowed:
            visible = visible & (window + n[None, :] > position[:, None] - sliding_window)
        s = tl.where(visible, s, -float("inf"))
    top = tl.maximum(best, tl.max(s, axis=1))
    shift = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp2(s - shift[:, None])
    shrink = tl.exp2(best - shift)
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
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
    page_size,
    sliding_window,
    sm_scale,
    softcap,
    TILING: tl.constexpr,
):
    follow(TILING.chained)
    split = tl.program_id(0) % TILING.splits
    row_tile = tl.program_id(0) // TILING.splits % TILING.row_tiles
    block = num_query_blocks - 1 - tl.program_id(0) // (TILING.splits * TILING.row_tiles)
    head = tl.program_id(1)
    seq = tl.load(query_blocks + 4 * block)
    first_row = tl.load(query_blocks + 4 * block + 1).to(tl.int64)
    num_rows = tl.load(query_blocks + 4 * block + 2)
    position = tl.load(query_blocks + 4 * block + 3)
    if row_tile * TILING.rows >= num_rows * TILING.group_size:
        return

    r = row_tile * TILING.rows + tl.arange(0, TILING.rows)
    row, q_head = r // TILING.group_size, head * TILING.group_size + r % TILING.group_size
    valid = row < num_rows
    q_rows = q + (first_row + row) * q_strides[0] + q_head.to(tl.int64) * q_strides[1]
    q_tile = load_tile(q_rows, valid, TILING.head_dim, TILING.dim)
    kv_head = (head * TILING.kv_heads // TILING.heads).to(tl.int64)
    table = block_table + seq.to(tl.int64) * table_stride

    last = position + num_rows
    chosen_blocks = indices + (block.to(tl.int64) * TILING.heads + head) * TILING.max_selected
    if TILING.selected:
        places = tl.arange(0, TILING.keys)
        chosen = 0
        for start in range(0, TILING.max_selected, TILING.keys):
            place = start + places
            one = tl.load(chosen_blocks + place, mask=place < TILING.max_selected, other=-1)
            chosen += tl.sum((one >= 0).to(tl.int32)) * TILING.key_block_size
        sink = tl.minimum(TILING.num_sink_tokens, last)
        window = tl.maximum(tl.minimum(tl.load(window_start + block), last), sink)
    else:
        sink = 0
        chosen = 0
        window = tl.maximum(position - sliding_window + 1, 0) if TILING.windowed else 0
    own = sink + chosen + last - window - num_rows  # place of the block's first own key in the list

    lowest = row_tile * TILING.rows // TILING.group_size
    highest = tl.minimum(((row_tile + 1) * TILING.rows - 1) // TILING.group_size, num_rows - 1)
    end = own + highest + 1
    tiles = tl.cdiv(tl.cdiv(end, TILING.keys), TILING.splits)
    begin = split * tiles * TILING.keys
    end = tl.minimum(end, begin + tiles * TILING.keys)
    whole = tl.minimum(
        (own + lowest + 1) // TILING.keys * TILING.keys, end // TILING.keys * TILING.keys
    )
    if TILING.windowed:
        whole = begin

    ROWS: tl.constexpr = TILING.rows
    DIM: tl.constexpr = TILING.dim
    acc = tl.zeros([ROWS, DIM], tl.float32)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    keys_at = (
        k + kv_head * k_strides[2],
        k_strides,
        v + kv_head * v_strides[2],
        v_strides,
        table,
        page_size,
    )
    listed = (end, sink, chosen, window, chosen_blocks)
    rows = (own + row, position + row)
    numbers = (sm_scale, softcap, sliding_window)
    for start in range(begin, whole, TILING.keys):
        state = (acc, best, total)
        acc, best, total = _attend(
            state, q_tile, keys_at, start, listed, rows, numbers, False, TILING
        )
    for start in range(tl.maximum(begin, whole), end, TILING.keys):
        state = (acc, best, total)
        acc, best, total = _attend(
            state, q_tile, keys_at, start, listed, rows, numbers, True, TILING
        )

    divisor = tl.where(total > 0, total, 1.0)
    logsum = tl.where(total > 0, (best + tl.log2(divisor)) * LN2, -float("inf"))
    token = first_row + row + split.to(tl.int64) * lse_stride
    tl.store(lse + token * (TILING.heads * TILING.group_size) + q_head, logsum, mask=valid)
    d = tl.arange(0, TILING.dim)
    rows_out = out + token * out_strides[0] + q_head * out_strides[1]
    keep = valid[:, None] & (d < TILING.head_dim)[None, :]
    result = (acc / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(rows_out[:, None] + d[None, :], result, mask=keep)


@triton.jit
def merge_kernel(
    parts, part_lse, out, out_strides, lse, num_tokens, SPLITS: tl.constexpr, TILING: tl.constexpr
):
    """Joins the splits of one row and head by their log-sum-exp."""
    follow(TILING.chained)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads: tl.constexpr = TILING.heads * TILING.group_size
    d = tl.arange(0, TILING.dim)
    split = tl.arange(0, SPLITS)
    there = split < TILING.splits
    row = (split * num_tokens + token) * num_heads + head
    sums = tl.load(part_lse + row, mask=there, other=-float("inf"))
    best = tl.max(sums, axis=0)
    weight = tl.exp2((sums - tl.where(best == -float("inf"), 0.0, best)) * LOG2E)
    total = tl.sum(weight, axis=0)
    inside = there[:, None] & (d < TILING.head_dim)[None, :]
    pieces = tl.load(parts + row[:, None] * TILING.head_dim + d[None, :], mask=inside, other=0.0)
    divisor = tl.where(total > 0, total, 1.0)
    joined = tl.sum(pieces * weight[:, None], axis=0) / divisor
    place = out + token * out_strides[0] + head * out_strides[1] + d
    tl.store(place, joined.to(out.dtype.element_ty), mask=d < TILING.head_dim)
    logsum = tl.where(total > 0, best + tl.log2(divisor) * LN2, -float("inf"))
    tl.store(lse + token * num_heads + head, logsum)


def block_sparse_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_blocks: Tensor,
    indices: Tensor | None,
    window_start: Tensor | None,
    *,
    num_sink_tokens: int,
    key_block_size: int,
    sliding_window: int,
    sm_scale: float,
    softcap: float,
    query_block_size: int,
) -> tuple[Tensor, Tensor]:
    """See `hipserve.ops.block_sparse_attention`; returns `out` and `lse`."""
    tokens, num_q_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, num_q_heads), dtype=torch.float32, device=q.device)
    blocks = query_blocks.shape[0]
    if not blocks:
        return out, lse
    tiling = make_tiling(
        q.shape,
        k_cache.shape,
        block_table.shape[1] * k_cache.shape[1],
        blocks,
        None if indices is None else indices.shape,
        min(query_block_size, tokens - blocks + 1),
        num_sink_tokens,
        key_block_size,
        sliding_window > 0,
        softcap > 0,
        k_cache.stride() == v_cache.stride(),
        q.element_size(),
        q.device,
    )
    parts, part_lse = out, lse
    if tiling.splits > 1:
        shape = (tiling.splits * tokens, num_q_heads, head_dim)
        parts = torch.empty(shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(shape[:2], dtype=torch.float32, device=q.device)
    attention_kernel[(blocks * tiling.row_tiles * tiling.splits, tiling.heads)](
        q,
        q.stride()[:2],
        k_cache,
        k_cache.stride()[:3],
        v_cache,
        v_cache.stride()[:3],
        parts,
        parts.stride()[:2],
        part_lse,
        tokens,
        block_table,
        block_table.stride(0),
        query_blocks,
        blocks,
        query_blocks if indices is None else indices,
        query_blocks if window_start is None else window_start,
        k_cache.shape[1],
        sliding_window,
        sm_scale,
        softcap,
        TILING=tiling,
        launch_pdl=tiling.chained,
        **launch_options(tiling),
    )
    if tiling.splits > 1:
        merge_kernel[(tokens, num_q_heads)](
            parts,
            part_lse,
            out,
            out.stride()[:2],
            lse,
            tokens,
            SPLITS=power_of_2(tiling.splits),
            TILING=tiling,
            num_warps=8 if tiling.dim > 256 else 2,
            launch_pdl=tiling.chained,
        )
    return out, lse


@functools.lru_cache(1024)
def make_tiling(
    q_shape: torch.Size,
    k_shape: torch.Size,
    longest: int,
    blocks: int,
    selected: torch.Size | None,
    max_rows: int,
    num_sink_tokens: int,
    key_block_size: int,
    windowed: bool,
    capped: bool,
    same_strides: bool,
    element_size: int,
    device: torch.device,
) -> Tiling:
    """Sizes of the launch, from shapes alone, so that a captured launch stays valid.

    `longest` is what a row of the block table holds, `selected` the shape of `indices`.
    """
    _, num_q_heads, head_dim = q_shape
    kv_heads = k_shape[2]
    heads = max(selected[1] if selected else 0, kv_heads)
    group, dim = num_q_heads // heads, power_of_2(head_dim)
    half = element_size == 2
    most, keys = largest_tile(dim, half, gpu_shared_memory(device))
    rows = max(min(most, power_of_2(max_rows * group)), 16)
    if most == MAX_ROWS and rows == 128:
        keys = 128
    row_tiles = -(-max_rows * group // rows)
    splits, small = 1, False
    if max_rows == 1:
        most = PROGRAMS // (blocks * heads)
        if selected is None and DENSE_PROGRAMS // (blocks * heads) > FEW_SPLITS:
            most = DENSE_PROGRAMS // (blocks * heads)
        small = half and dim <= 128 and selected is not None and 1 < most <= FEW_SPLITS
        if small:
            keys, most = 32, SMALL_PROGRAMS // (blocks * heads)
        splits = max(min(most, longest // keys, MAX_SPLITS), 1)
    return Tiling(
        group,
        heads,
        kv_heads,
        head_dim,
        dim,
        rows,
        keys,
        row_tiles,
        splits,
        small,
        num_sink_tokens,
        key_block_size,
        selected[2] if selected else 0,
        selected is not None,
        windowed,
        capped,
        same_strides,
        chains_launches(device),
    )


def largest_tile(dim: int, half: bool, shared: int) -> tuple[int, int]:
    """Most rows of a tile, and its keys, so that accumulators fit registers and keys the memory."""
    if dim <= 128:
        most = MAX_ROWS if shared >= WIDE_BYTES else MAX_ROWS // 4
        return (most, 64) if half else (max(most // 2, MAX_ROWS // 4), 32)
    if half:
        return (MAX_ROWS // 4 if dim == 256 else 32), 32
    return (32 if dim == 256 else 16), 16


def launch_options(tiling: Tiling) -> dict[str, int]:
    """Warps and pipeline depth, as measured on an H200 and an H100 (docs/gpu.md)."""
    if tiling.dim > 256:  # not measured: the first that fits every GPU and spills nothing
        one = tiling.splits > 1 or tiling.keys == 16
        return {"num_warps": 4 if tiling.splits > 1 else 8, "num_stages": 1 if one else 2}
    if tiling.small:
        return {"num_warps": 1, "num_stages": 2}
    if tiling.splits > 1:  # the more splits, the fewer tiles there are in each
        return {"num_warps": 2, "num_stages": 1 if tiling.splits > FEW_SPLITS else 2}
    if tiling.rows >= 128:
        return {"num_warps": tiling.rows // 16, "num_stages": 2}
    return {"num_warps": 8 if tiling.rows * tiling.dim > 8192 else 4, "num_stages": 3}
