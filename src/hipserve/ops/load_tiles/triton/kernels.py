"""The three kernels: which tiles to load, loading them, and writing rows through.

`resolve_kernel` has one program for each KV head. It passes over the lists of a step: tiles that
are there are stamped, and the first entry that misses a tile claims it. Where tiles are missing, it
passes twice more: every claim gets a slot from the clock; every entry that missed reads its slot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.chain import dependent_launch_signal, dependent_launch_wait
from hipserve.ops._triton.rows import RowStrides


class PageStrides(NamedTuple):
    """Strides of pages `[num_pages, num_kv_heads, 2, page_size, head_dim]`, in elements."""

    page: Any
    head: Any
    plane: Any
    """From keys to values."""


class Reading(NamedTuple):
    """What lists are made of: the record of the same name in `hipserve.ops.load_tiles.reading`."""

    num_lists: Any
    """Lists of one KV head."""
    max_tiles: Any
    query_blocks: Any
    indices: Any
    window_start: Any
    block_table: Any
    table_stride: Any
    page_size: Any


class Entries(NamedTuple):
    """Some entries of some lists, `[ROWS, WIDTH]` each."""

    at: Any
    """Where an entry is in `lists`."""
    order: Any
    """Its number among those of the head."""
    exists: Any
    """It is an entry of a list, though perhaps behind its last tile."""


@triton.jit
def entries_of(head, first, start, reading, LISTS: tl.constexpr):
    """The `Entries` [start, start + WIDTH) of the head's lists [first, first + ROWS)."""
    row = first + tl.arange(0, LISTS.rows)[:, None]
    entry = start + tl.arange(0, LISTS.width)[None, :]
    of_all = row // LISTS.group * LISTS.heads + head * LISTS.group + row % LISTS.group
    exists = (row < reading.num_lists) & (entry < reading.max_tiles)
    max_tiles = reading.max_tiles
    return Entries(of_all * max_tiles + entry, row * max_tiles + entry, exists)


class KeyLists(NamedTuple):
    """What some lists read, `[ROWS]` each; see `KeyList` of block-sparse attention."""

    there: Any
    """It is a list of a query block with rows; others are empty."""
    seq: Any
    sinks: Any
    """Keys of the sinks, which come first."""
    chosen: Any
    """Keys in chosen blocks, which come next."""
    window: Any
    """Position of the first key after those."""
    length: Any
    """Keys of the list."""
    blocks: Any
    """Pointer to the chosen blocks."""


@triton.jit
def key_lists_of(head, first, reading, LISTS: tl.constexpr):
    """The `KeyLists` [first, first + ROWS) of the head."""
    row = first + tl.arange(0, LISTS.rows)
    block = row // LISTS.group
    there = row < reading.num_lists
    rows = tl.load(reading.query_blocks + 4 * block + 2, mask=there, other=0)  # [ROWS]
    there &= rows > 0
    seq = tl.load(reading.query_blocks + 4 * block, mask=there, other=0).to(tl.int64)  # [ROWS]
    last = tl.load(reading.query_blocks + 4 * block + 3, mask=there, other=0) + rows  # [ROWS]
    of_head = head * LISTS.group + row % LISTS.group
    blocks = reading.indices + (block * LISTS.heads + of_head).to(tl.int64) * LISTS.max_selected
    if LISTS.max_selected > 0:
        i = tl.arange(0, LISTS.selected)
        inside = there[:, None] & (i < LISTS.max_selected)[None, :]
        found = tl.load(blocks[:, None] + i[None, :], mask=inside, other=-1)  # [ROWS, SELECTED]
        chosen = tl.sum((found >= 0).to(tl.int32), axis=1) * LISTS.key_block_size
        sinks = tl.minimum(LISTS.num_sink_tokens, last)
        window = tl.load(reading.window_start + block, mask=there, other=0)  # [ROWS]
        window = tl.maximum(tl.minimum(window, last), sinks)
    else:
        chosen = tl.zeros_like(last)
        sinks = chosen
        window = chosen
    length = tl.where(there, sinks + chosen + last - window, 0)
    length = tl.minimum(length, reading.max_tiles * LISTS.tile)
    return KeyLists(there, seq, sinks, chosen, window, length, blocks)


@triton.jit
def longest_of(lists, LISTS: tl.constexpr):
    """Tiles of the longest of some lists."""
    return tl.cdiv(tl.max(lists.length, axis=0), LISTS.tile)


@triton.jit
def tiles_of(start, some, reading, LISTS: tl.constexpr):
    """`[ROWS, WIDTH]` int32: the tiles [start, start + WIDTH) of `some` lists; -1 behind the last
    of a list."""
    n = ((start + tl.arange(0, LISTS.width)) * LISTS.tile)[None, :]
    read = n < some.length[:, None]
    if LISTS.max_selected > 0:
        behind = n - some.sinks[:, None]
        is_chosen = (behind >= 0) & (behind < some.chosen[:, None])
        at = some.blocks[:, None] + behind // LISTS.key_block_size
        of = tl.load(at, mask=is_chosen & read, other=0)  # [ROWS, WIDTH]
        outside = tl.where(behind < 0, n, some.window[:, None] + behind - some.chosen[:, None])
        inside_block = behind % LISTS.key_block_size
        position = tl.where(is_chosen, of * LISTS.key_block_size + inside_block, outside)
    else:
        position = tl.broadcast_to(n, [LISTS.rows, LISTS.width])
    at = some.seq[:, None] * reading.table_stride + position // reading.page_size
    page = tl.load(reading.block_table + at, mask=read, other=0)  # [ROWS, WIDTH]
    tile = page * (reading.page_size // LISTS.tile) + position % reading.page_size // LISTS.tile
    return tl.where(read, tile, -1)


@triton.jit
def missing_tiles(lists, entries):
    """`[ROWS, WIDTH]` int32: the tiles of those of the entries that missed them; -1 elsewhere."""
    # of the shape [ROWS, WIDTH]:
    entry = tl.load(lists + entries.at, mask=entries.exists, other=-1, cache_modifier=".cg")
    return tl.where(entry < -1, -2 - entry, -1)


@triton.jit
def sweep(stamp, victims, num_slots, hand, step, wanted, SWEEP: tl.constexpr):
    """Writes the next `wanted` slots of the clock to `victims`; returns where the hand stands.

    Slots of this step stay. Others that were read since the hand came by stay once.
    """
    i = tl.arange(0, SWEEP)
    have = 0
    while have < wanted:
        inside = i < num_slots
        slot = (hand + i) % num_slots
        read = tl.load(stamp + slot, mask=inside, other=step, cache_modifier=".cg")  # [SWEEP]
        free = read == 0
        rank = have + tl.cumsum(free.to(tl.int32), axis=0)
        taken = free & (rank <= wanted)
        found = have + tl.sum(free.to(tl.int32), axis=0)
        final = tl.max(tl.where(taken, i, -1), axis=0) + 1
        passed = tl.where(found >= wanted, final, tl.minimum(num_slots, SWEEP))
        spared = inside & (i < passed) & (read != 0) & (read != step)
        tl.store(stamp + slot, tl.zeros([SWEEP], tl.int32), mask=spared)
        tl.store(victims + rank - 1, slot, mask=taken)
        tl.store(stamp + slot, tl.zeros([SWEEP], tl.int32) + step, mask=taken)
        have = tl.minimum(found, wanted)
        hand = (hand + passed) % num_slots
        tl.debug_barrier()
    return hand


@triton.jit
def resolve_kernel(
    where,
    where_stride,
    owner,
    stamp,
    num_slots,
    state,
    loads,
    counts,
    victims,
    lists,
    reading,
    LISTS: tl.constexpr,
):
    """Finds a slot for every tile that the lists of one KV head need, and notes what to load.

    where[tile] is a slot, -1, or, between the passes, the number of the entry that claimed the
    tile, minus CLAIM. lists holds slots, between the passes -2 - tile for each that is missing.
    Lists that are looked at together are read up to the end of the longest; what is behind it in
    `lists` stays as it was.
    """
    dependent_launch_wait(LISTS.chained)
    dependent_launch_signal(LISTS.chained)
    reading = Reading(*reading)
    CLAIM: tl.constexpr = 1 << 30
    N: tl.constexpr = LISTS.rows * LISTS.width
    head = tl.program_id(0)
    where += head.to(tl.int64) * where_stride
    owner += head * num_slots
    stamp += head * num_slots
    victims += head * num_slots
    loads += head.to(tl.int64) * num_slots * 2
    step = tl.load(state + 3 * head) + 1
    hand = tl.load(state + 3 * head + 1)
    needed, absent = 0, 0
    for first in range(0, reading.num_lists, LISTS.rows):
        some = key_lists_of(head, first, reading, LISTS)
        for start in range(0, longest_of(some, LISTS), LISTS.width):
            entries = entries_of(head, first, start, reading, LISTS)
            tile = tiles_of(start, some, reading, LISTS)
            there = tile >= 0
            # of the shape [ROWS, WIDTH]:
            slot = tl.load(where + tile, mask=there, other=-1, cache_modifier=".cg")
            tl.store(stamp + slot, tl.zeros_like(slot) + step, mask=there & (slot >= 0))
            tl.atomic_min(where + tile, entries.order - CLAIM, mask=there & (slot < 0))
            missing = there & (slot < 0)
            entry = tl.where(missing, -2 - tile, tl.where(there, slot, -1))
            tl.store(lists + entries.at, entry, mask=entries.exists)
            needed += tl.sum(tl.sum(there.to(tl.int32), axis=1), axis=0)
            absent += tl.sum(tl.sum(missing.to(tl.int32), axis=1), axis=0)
    tl.debug_barrier()

    loaded = 0
    if absent > 0:
        for first in range(0, reading.num_lists, LISTS.rows):
            some = key_lists_of(head, first, reading, LISTS)
            for start in range(0, longest_of(some, LISTS), LISTS.width):
                entries = entries_of(head, first, start, reading, LISTS)
                tile = missing_tiles(lists, entries)
                # of the shape [ROWS, WIDTH]:
                found = tl.load(where + tile, mask=tile >= 0, other=0, cache_modifier=".cg")
                wins = (tile >= 0) & (found == entries.order - CLAIM)
                wins, tile = tl.reshape(wins, [N]), tl.reshape(tile, [N])
                wanted = tl.sum(wins.to(tl.int32), axis=0)
                rank = tl.cumsum(wins.to(tl.int32), axis=0) - 1
                hand = sweep(stamp, victims, num_slots, hand, step, wanted, LISTS.sweep)
                slot = tl.load(victims + rank, mask=wins, other=0, cache_modifier=".cg")  # [N]
                before = tl.load(owner + slot, mask=wins, other=-1)  # [N]
                held = tl.load(where + before, mask=before >= 0, other=-1, cache_modifier=".cg")
                stale = (before >= 0) & (held == slot)
                tl.store(where + before, tl.full([N], -1, tl.int32), mask=stale)
                tl.store(owner + slot, tile, mask=wins)
                tl.store(where + tile, slot, mask=wins)
                tl.store(loads + 2 * (loaded + rank), slot, mask=wins)
                tl.store(loads + 2 * (loaded + rank) + 1, tile, mask=wins)
                loaded += wanted
                tl.debug_barrier()

        for first in range(0, reading.num_lists, LISTS.rows):
            some = key_lists_of(head, first, reading, LISTS)
            for start in range(0, longest_of(some, LISTS), LISTS.width):
                entries = entries_of(head, first, start, reading, LISTS)
                tile = missing_tiles(lists, entries)
                # of the shape [ROWS, WIDTH]:
                slot = tl.load(where + tile, mask=tile >= 0, other=-1, cache_modifier=".cg")
                tl.store(lists + entries.at, slot, mask=tile >= 0)
    tl.store(state + 3 * head, step)
    tl.store(state + 3 * head + 1, hand)
    tl.store(state + 3 * head + 2, loaded)
    tl.store(counts + 2 * head, tl.load(counts + 2 * head) + needed)
    tl.store(counts + 2 * head + 1, tl.load(counts + 2 * head + 1) + loaded)


@triton.jit
def load_kernel(
    tiles,
    slot_stride,
    head_stride,
    pages,
    page_strides,
    loads,
    state,
    num_slots,
    page_size,
    PROGRAMS: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Copies the tiles in `loads` from their pages: keys and values of `PAIRS` tiles together."""
    dependent_launch_wait(CHAINED)
    dependent_launch_signal(CHAINED)
    strides = PageStrides(*page_strides)
    head = tl.program_id(0).to(tl.int64)
    count = tl.load(state + 3 * head + 2)
    r = tl.arange(0, PAIRS * 2 * TILE)
    plane, row = r // TILE % 2, r % TILE
    d = tl.arange(0, DIM)
    loads += head * num_slots * 2
    per_page = page_size // TILE
    for first in range(tl.program_id(1) * PAIRS, count, PROGRAMS * PAIRS):
        pair = first + r // (2 * TILE)
        there = pair < count
        slot = tl.load(loads + 2 * pair, mask=there, other=0).to(tl.int64)  # [PAIRS * 2 * TILE]
        tile = tl.load(loads + 2 * pair + 1, mask=there, other=0)
        keep = there[:, None] & (d < HEAD_DIM)[None, :]
        in_page = (tile % per_page * TILE + row) * HEAD_DIM
        source = pages + (tile // per_page).to(tl.int64) * strides.page + in_page
        source += head * strides.head + plane * strides.plane
        # of the shape [PAIRS * 2 * TILE, DIM]:
        rows = tl.load(source[:, None] + d[None, :], mask=keep, cache_modifier=".cg")
        to = tiles + head * head_stride + slot * slot_stride + (plane * TILE + row) * HEAD_DIM
        tl.store(to[:, None] + d[None, :], rows, mask=keep)


@triton.jit
def store_kernel(
    k,
    k_strides,
    v,
    v_strides,
    tiles,
    slot_stride,
    head_stride,
    where,
    where_stride,
    pages,
    page_strides,
    slot_mapping,
    page_size,
    num_heads,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Writes the rows of one token, all heads, to its page, and to its tile if that is resident."""
    dependent_launch_wait(CHAINED)
    dependent_launch_signal(CHAINED)
    strides = PageStrides(*page_strides)
    k_strides, v_strides = RowStrides(*k_strides), RowStrides(*v_strides)
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(slot_mapping + token)
    if at < 0:
        return
    page, offset = at // page_size, at % page_size
    head, d = tl.arange(0, HEADS).to(tl.int64), tl.arange(0, DIM)[None, :]
    there = head < num_heads
    inside = there[:, None] & (d < HEAD_DIM)
    tile = page * (page_size // TILE) + offset // TILE
    slot = tl.load(where + head * where_stride + tile, mask=there, other=-1).to(tl.int64)  # [HEADS]
    resident = inside & (slot >= 0)[:, None]
    in_page = pages + page * strides.page + head * strides.head + offset * HEAD_DIM
    in_tile = tiles + head * head_stride + slot * slot_stride + offset % TILE * HEAD_DIM
    # of the shape [HEADS, DIM]:
    row = tl.load(k + token * k_strides.token + head[:, None] * k_strides.head + d, mask=inside)
    tl.store(in_page[:, None] + d, row, mask=inside)
    tl.store(in_tile[:, None] + d, row, mask=resident)
    # of the shape [HEADS, DIM]:
    row = tl.load(v + token * v_strides.token + head[:, None] * v_strides.head + d, mask=inside)
    tl.store(in_page[:, None] + strides.plane + d, row, mask=inside)
    tl.store(in_tile[:, None] + TILE * HEAD_DIM + d, row, mask=resident)
