"""What a recorded decode step is made for, and whether a graph reaches the keys that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hipserve.attention.crossover import rule_for
from hipserve.cache import PageStore, ResidentPages
from hipserve.cache.store import grown
from hipserve.cache.tiles import TiledPages, most_row_tiles
from hipserve.config import HiPConfig
from hipserve.plan import PruningRule

if TYPE_CHECKING:
    from hipserve.integrations.transformers.cache import HiPCache

ALIGNED = 16
"""Columns of a block table are a multiple of it: for others Triton compiles other kernels."""


def device_of(store: PageStore) -> torch.device | None:
    """Where a graph would read these pages; None for a file, which no graph reads."""
    if isinstance(store, TiledPages):
        return store.arena.tiles.device
    return store.pool.k_cache.device if isinstance(store, ResidentPages) else None


def memory_of(store: PageStore) -> Tensor:
    """A tensor that the store exchanges for another when what a graph reads moves."""
    return store.arena.where if isinstance(store, TiledPages) else store.pool.k_cache


def in_reach(cache: HiPCache, ids: Tensor) -> bool:
    """All layers keep the sequences of `ids` `[batch, 1]` in pages that the device of `ids` reads,
    and as many tokens of them."""
    layers = cache.paged_layers
    if len(layers) < len(cache.layers) or not layers[0].seen:
        return False
    return len(layers[0].pages.lengths) == len(ids) and all(
        not layer.unfinished
        and layer.seen == layers[0].seen
        and device_of(layer.pages.store) == ids.device
        for layer in layers
    )


@dataclass(frozen=True, slots=True)
class StepRoom:
    """How far a step may go before it has to be recorded again.

    Attributes:
        device: that reads the pages.
        columns: of its block table.
        rule: which rows are pruned.
        row_tiles: maximum tiles of a list of a row, of keys and values in host memory.
    """

    device: torch.device
    columns: int
    rule: PruningRule
    row_tiles: int

    @classmethod
    def of(cls, cache: HiPCache, config: HiPConfig, num_q_heads: int) -> StepRoom | None:
        """That of the next step; None where an arena has too few slots for the tiles that its rows
        may read, wherever they are then."""
        pages = [layer.pages for layer in cache.paged_layers]
        first = pages[0]
        columns = first.block_table.shape[1]
        columns = -(-grown(columns, columns, first.page_size) // ALIGNED) * ALIGNED
        keys, device = first.pool.k_cache, device_of(first.store)
        assert device is not None
        group = num_q_heads // keys.shape[2]
        rule = rule_for(config, device, keys.dtype, keys.shape[3], group)
        tiles = most_row_tiles(config, rule, columns * first.page_size)
        lists = len(first.lengths) * config.lists_of(group)
        arenas = [p.store.arena for p in pages if isinstance(p.store, TiledPages)]
        fits = all(lists * tiles <= arena.num_slots for arena in arenas)
        return cls(device, columns, rule, tiles) if fits else None
