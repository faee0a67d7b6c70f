"""`load_tiles` and `store_rows`: checks and dispatch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.offload import TILE_SIZE
from hipserve.ops import checks
from hipserve.ops.load_tiles import reference
from hipserve.ops.load_tiles.reading import Reading
from hipserve.plan import BatchLayout
from hipserve.platform import resolve_backend
from hipserve.types import BlockSelection, KeyPool, TileArena, TileLists


def _backend(name: str, arena: TileArena) -> Any:
    tiles = arena.tiles
    chosen = resolve_backend(name, tiles.device, tiles.dtype, tiles.shape[-1])
    if chosen == "triton":
        from hipserve.ops.load_tiles import triton

        return triton
    return reference


def load_tiles(
    arena: TileArena,
    pages: Tensor,
    layout: BatchLayout,
    selection: BlockSelection | None = None,
    *,
    config: HiPConfig,
    max_tiles: int,
    backend: str = "auto",
    check: bool = True,
) -> KeyPool:
    """Makes the tiles that a step reads resident; nothing waits for the host.

    Each query block reads sinks, chosen blocks and window, or everything without a selection. One
    without rows, which pads a batch, reads nothing.

    Args:
        arena: of these pages.
        pages: `[num_pages, num_kv_heads, 2, page_size, head_dim]`, keys and values, in memory that
            the device of the arena can read.
        layout: lengths and page ids of the batch.
        selection: from `select_blocks` with the same `config`.
        config: its block sizes and sinks, multiples of `TILE_SIZE`.
        max_tiles: maximum number of tiles of a query block and head; more than are read cost
            memory and no time.
        backend: `auto`, `triton` or `reference`.
        check: False skips the checks, for callers that have made them.

    Returns:
        the tiles as `block_sparse_attention` takes them, for this selection and this step only.

    Raises:
        ArgumentError: the arena is smaller than what may be needed, or sizes are no multiples.
    """
    page_size = pages.shape[3]
    blocks = layout.query_blocks(config.query_block_size)
    reading = Reading(
        block_table=layout.block_table,
        query_blocks=blocks,
        indices=selection.indices.contiguous() if selection else None,
        window_start=selection.window_start.contiguous() if selection else None,
        num_sink_tokens=config.num_sink_tokens,
        key_block_size=config.key_block_size,
        max_tiles=max_tiles,
        page_size=page_size,
        num_kv_heads=arena.tiles.shape[0],
    )
    if check:
        _check(arena, pages, reading)
    slots = _backend(backend, arena).load_tiles(arena, pages, reading)
    k_cache, v_cache = (arena.tiles[:, :, i].permute(1, 2, 0, 3) for i in range(2))
    return KeyPool(k_cache, v_cache, lists=TileLists(slots, page_size))


def store_rows(
    k: Tensor,
    v: Tensor,
    arena: TileArena,
    pages: Tensor,
    slot_mapping: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Writes rows to pages, and through to their tiles where these are resident.

    Args:
        k, v: `[num_tokens, num_kv_heads, head_dim]`.
        arena, pages: as in `load_tiles`; pages `[num_pages, num_kv_heads, 2, page_size, head_dim]`.
        slot_mapping: `[num_tokens]` int64, page * page_size + offset; -1 skips a token.
        backend: `auto`, `triton` or `reference`.
    """
    _backend(backend, arena).store_rows(k, v, arena, pages, slot_mapping)


def _check(arena: TileArena, pages: Tensor, reading: Reading) -> None:
    for name in ("num_sink_tokens", "key_block_size", "page_size"):
        value = getattr(reading, name)
        whole = value % TILE_SIZE == 0
        checks.require(whole, name, f"a multiple of {TILE_SIZE}, the keys of a tile", value)
    heads, slots = arena.tiles.shape[0], arena.num_slots
    shape = (arena.where.shape[1] * TILE_SIZE // reading.page_size, heads, 2)
    fits = pages.shape[0] >= shape[0] and tuple(pages.shape[1:3]) == shape[1:]
    expected = f"[{shape[0]}, {heads}, 2, page_size, head_dim] as the arena"
    checks.require(fits, "pages", expected, list(pages.shape))
    needed = reading.num_lists // heads * reading.max_tiles
    checks.require(
        needed <= slots,
        "arena",
        f"{needed} slots a head or more: {reading.num_lists // heads} lists of {reading.max_tiles}",
        slots,
        "make it larger, or read fewer rows at a time",
    )
