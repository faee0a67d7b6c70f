"""The definition of `load_tiles`: eager torch, one head and one tile at a time, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.offload import TILE_SIZE
from hipserve.ops.load_tiles.reading import Reading
from hipserve.types import TileArena


def load_tiles(arena: TileArena, pages: Tensor, reading: Reading) -> Tensor:
    """`[num_query_blocks, heads, max_tiles]` int32: the slots of the tiles that are read; -1 behind
    the last. pages `[num_pages, num_kv_heads, 2, page_size, head_dim]`."""
    tiles = tile_lists(reading)
    slots = tiles.clone()
    group = reading.heads // reading.num_kv_heads
    for head in range(reading.num_kv_heads):
        mine = tiles[:, head * group : (head + 1) * group]
        load_head(arena, pages[:, head], head, mine[mine >= 0].tolist())
        found = arena.where[head][mine.clamp(min=0).long()]
        slots[:, head * group : (head + 1) * group] = torch.where(mine >= 0, found, -1)
    return slots


def tile_lists(reading: Reading) -> Tensor:
    """`[num_query_blocks, heads, max_tiles]` int32: page * tiles of a page + tile, for every tile
    of sinks, chosen blocks and window in this order; -1 behind the last. Query blocks without rows,
    which pad a batch, read none."""
    shape = (len(reading.query_blocks), reading.heads, reading.max_tiles)
    lists = torch.full(shape, -1, dtype=torch.int32, device=reading.block_table.device)
    for block, (seq, _, rows, position) in enumerate(reading.query_blocks.tolist()):
        for head in range(reading.heads if rows else 0):
            starts = tile_starts(reading, block, head, position + rows)[: reading.max_tiles]
            page = reading.block_table[seq, starts // reading.page_size]
            inside = (starts % reading.page_size // TILE_SIZE).int()
            tiles = page * (reading.page_size // TILE_SIZE) + inside
            lists[block, head, : len(starts)] = tiles
    return lists


def tile_starts(reading: Reading, block: int, head: int, last: int) -> Tensor:
    """`[n]` int64: first positions of the tiles that one list reads, which ends before `last`."""
    device = reading.block_table.device
    if reading.indices is None or reading.window_start is None:
        return torch.arange(0, last, TILE_SIZE, device=device)
    sinks = min(reading.num_sink_tokens, last)
    window = max(min(int(reading.window_start[block]), last), sinks)
    chosen = reading.indices[block, head]
    first = chosen[chosen >= 0].long() * reading.key_block_size
    inside = torch.arange(0, reading.key_block_size, TILE_SIZE, device=device)
    parts = [torch.arange(*ends, TILE_SIZE, device=device) for ends in ((0, sinks), (window, last))]
    return torch.cat([parts[0], (first[:, None] + inside).flatten(), parts[1]])


def load_head(arena: TileArena, pages: Tensor, head: int, needed: list[int]) -> None:
    """One step of one head: stamps what is there and loads the rest, each tile once.

    pages: `[num_pages, 2, page_size, head_dim]`.
    """
    where, owner = arena.where[head], arena.owner[head]
    step, hand, _ = arena.state[head].tolist()
    step += 1
    missing = [tile for tile in dict.fromkeys(needed) if where[tile] < 0]
    stamp = arena.stamp[head]
    stamp[where[[tile for tile in needed if where[tile] >= 0]].long()] = step
    for i, tile in enumerate(missing):
        slot, hand = give_up(stamp, step, hand)
        before = int(owner[slot])
        if before >= 0 and where[before] == slot:
            where[before] = -1
        owner[slot], where[tile], stamp[slot] = tile, slot, step
        arena.loads[head, i] = torch.tensor([slot, tile])
        page, inside = divmod(tile, pages.shape[2] // TILE_SIZE)
        rows = slice(inside * TILE_SIZE, (inside + 1) * TILE_SIZE)
        arena.tiles[head, slot] = pages[page, :, rows].to(arena.tiles.device)
    arena.state[head] = torch.tensor([step, hand, len(missing)])
    arena.counts[head] += torch.tensor([len(needed), len(missing)], device=arena.counts.device)


def give_up(stamp: Tensor, step: int, hand: int) -> tuple[int, int]:
    """The next slot of a clock, and where its hand stands afterwards.

    The hand passes over slots of this step, and once over slots that were read since it came by.
    stamp: `[num_slots]`.
    """
    while True:
        slot, hand = hand, (hand + 1) % len(stamp)
        if stamp[slot] == 0:
            return slot, hand
        if stamp[slot] != step:
            stamp[slot] = 0


def store_rows(k: Tensor, v: Tensor, arena: TileArena, pages: Tensor, slot_mapping: Tensor) -> None:
    """See `hipserve.ops.store_rows`; k, v `[num_tokens, num_kv_heads, head_dim]`, pages
    `[num_pages, num_kv_heads, 2, page_size, head_dim]`, slot_mapping `[num_tokens]`."""
    size = pages.shape[3]
    for token, at in enumerate(slot_mapping.tolist()):
        if at < 0:
            continue
        page, offset = divmod(at, size)
        rows = torch.stack([k[token], v[token]], dim=1)  # [num_kv_heads, 2, head_dim]
        pages[page, :, :, offset] = rows.to(pages.device)
        found = arena.where[:, page * (size // TILE_SIZE) + offset // TILE_SIZE]
        for head in (found >= 0).nonzero()[:, 0].tolist():
            arena.tiles[head, int(found[head]), :, offset % TILE_SIZE] = rows[head]
