"""Launches of what loads tiles: their sizes follow from shapes only, so they can be captured."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve.offload import TILE_SIZE
from hipserve.ops._triton.constants import HashedOnce
from hipserve.ops._triton.tiles import power_of_2
from hipserve.ops.load_tiles.reading import Reading
from hipserve.ops.load_tiles.triton.kernels import load_kernel, resolve_kernel, store_kernel
from hipserve.platform import chains_launches
from hipserve.types import TileArena

ENTRIES = 1024
"""Entries of lists that a program looks at together, at most."""
NARROW = 128
"""Entries of each list that it looks at together where there are many lists: most lists of single
rows are shorter, however long the longest may be."""
SWEEP = 1024
"""Slots that the hand of a clock looks at together, at most."""
PROGRAMS = 32
"""Programs that copy, of all heads: more of them do not make a link faster."""
PAIRS = 2
"""Tiles of keys, and as many of values, that each has in flight."""


@dataclass(frozen=True, kw_only=True)
class Lists(HashedOnce):
    """What lists are, as `resolve_kernel` is compiled for them.

    Attributes:
        group: lists of a query block that one KV head serves.
        heads: lists of a query block.
        num_sink_tokens, key_block_size: as in `Reading`.
        max_selected: blocks of a list; 0 where everything is read.
        selected: the same, padded to a power of two.
        rows, width: lists, and entries of each, that are looked at together.
        sweep: slots that the hand looks at together.
        chained: a kernel may start while the one before it ends.
        tile: keys of a tile.
    """

    __hash__ = HashedOnce.__hash__
    group: int
    heads: int
    num_sink_tokens: int
    key_block_size: int
    max_selected: int
    selected: int
    rows: int
    width: int
    sweep: int
    chained: bool
    tile: int = TILE_SIZE


@functools.lru_cache(256)
def plan_lists(
    heads: int,
    num_kv_heads: int,
    blocks: int,
    max_tiles: int,
    num_slots: int,
    rest: tuple[int, int, int, bool],
) -> Lists:
    """Sizes of a launch; rest: num_sink_tokens, key_block_size, max_selected, and chained."""
    num_sink_tokens, key_block_size, max_selected, chained = rest
    group = heads // num_kv_heads
    whole = power_of_2(max_tiles)
    rows = min(power_of_2(blocks * group), ENTRIES // min(whole, NARROW))
    return Lists(
        group=group,
        heads=heads,
        num_sink_tokens=num_sink_tokens,
        key_block_size=key_block_size,
        max_selected=max_selected,
        selected=power_of_2(max(max_selected, 1)),
        rows=rows,
        width=min(whole, ENTRIES // rows),
        sweep=min(power_of_2(num_slots), SWEEP),
        chained=chained,
    )


def load_tiles(arena: TileArena, pages: Tensor, reading: Reading) -> Tensor:
    """See `hipserve.ops.load_tiles`; pages `[num_pages, num_kv_heads, 2, page_size, head_dim]`.

    Returns:
        `[num_query_blocks, heads, max_tiles]` int32: slots; anything behind the last.
    """
    blocks, heads, device = reading.query_blocks.shape[0], reading.heads, arena.tiles.device
    ints = {"dtype": torch.int32, "device": device}
    lists = torch.empty((blocks, heads, reading.max_tiles), **ints)
    if not lists.numel():
        return lists
    kv_heads, slots, _, _, dim = arena.tiles.shape
    indices, starts = reading.indices, reading.window_start
    selected = 0 if indices is None else indices.shape[2]
    chained = chains_launches(device)
    rest = (reading.num_sink_tokens, reading.key_block_size, selected, chained)
    sizes = plan_lists(heads, kv_heads, blocks, reading.max_tiles, slots, rest)
    resolve_kernel[(kv_heads,)](
        *(arena.where, arena.where.stride(0), arena.owner, arena.stamp, slots),
        *(arena.state, arena.loads, arena.counts, torch.empty((kv_heads, slots), **ints)),
        lists,
        (
            *(blocks * sizes.group, reading.max_tiles, reading.query_blocks),
            reading.query_blocks if indices is None else indices,
            reading.query_blocks if starts is None else starts,
            *(reading.block_table, reading.block_table.stride(0), reading.page_size),
        ),
        LISTS=sizes,
        num_warps=8,
        launch_pdl=chained,
    )
    programs = max(PROGRAMS // kv_heads, 1)
    load_kernel[(kv_heads, programs)](
        *(arena.tiles, arena.tiles.stride(1), arena.tiles.stride(0)),
        *(pages, pages.stride()[:3], arena.loads, arena.state, slots, reading.page_size),
        PROGRAMS=programs,
        PAIRS=PAIRS,
        TILE=TILE_SIZE,
        HEAD_DIM=dim,
        DIM=power_of_2(dim),
        CHAINED=chained,
        num_warps=4,
        launch_pdl=chained,
    )
    return lists


def store_rows(k: Tensor, v: Tensor, arena: TileArena, pages: Tensor, slot_mapping: Tensor) -> None:
    """See `hipserve.ops.store_rows`; k, v `[num_tokens, num_kv_heads, head_dim]`, pages
    `[num_pages, num_kv_heads, 2, page_size, head_dim]`, slot_mapping `[num_tokens]`."""
    tokens, heads, dim = k.shape
    if tokens:
        chained = chains_launches(k.device)
        store_kernel[(tokens,)](
            *(k, k.stride()[:2], v, v.stride()[:2]),
            *(arena.tiles, arena.tiles.stride(1), arena.tiles.stride(0)),
            *(arena.where, arena.where.stride(0), pages, pages.stride()[:3]),
            *(slot_mapping, pages.shape[3], heads),
            TILE=TILE_SIZE,
            HEADS=power_of_2(heads),
            HEAD_DIM=dim,
            DIM=power_of_2(dim),
            CHAINED=chained,
            num_warps=2,
            launch_pdl=chained,
        )
