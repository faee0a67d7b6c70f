"""Small frozen records that cross rooms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.offload import TILE_SIZE
from hipserve.plan import BatchLayout


@dataclass(frozen=True, slots=True)
class TileLists:
    """Which tiles hold the keys that query blocks read.

    Attributes:
        slots: `[num_query_blocks, heads, max_tiles]` int32. A query block reads sinks, chosen
            blocks and window as one list of keys; entry i is the tile of its keys from
            `TILE_SIZE` * i on. What is behind the last has no meaning.
        page_size: keys of a page of the layout.
    """

    slots: Tensor
    page_size: int


@dataclass(frozen=True, slots=True)
class KeyPool:
    """The exact keys and values of one layer, in pages: what attention reads.

    Attributes:
        k_cache, v_cache: `[num_pages, page_size, num_kv_heads, head_dim]`; any strides with a
            contiguous last axis. In the dtype of queries, or in float8_e4m3fn or float8_e5m2.
        places: `[pages of the layout]` int32: which of these pages each page of the layout and of
            the index is, where some of them were staged; None where they are the same.
        lists: where these pages are tiles of `TILE_SIZE` keys: those that a step reads.
        k_scale, v_scale: of pages in fp8: a key is k_scale times what its page holds, a value
            v_scale times that. 1 for other pages.
    """

    k_cache: Tensor
    v_cache: Tensor
    places: Tensor | None = None
    lists: TileLists | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[3]


@dataclass(frozen=True, slots=True)
class TileArena:
    """Tiles of a layer on the device, and what says which of them: a cache of pages elsewhere.

    A tile that is here equals its page, always: whoever writes one writes both. Slots are given up
    in the order of a clock: its hand passes over those that were read since it came by last.

    Attributes:
        tiles: `[num_kv_heads, num_slots, 2, TILE_SIZE, head_dim]`, keys and values.
        where: `[num_kv_heads, num_pages * page_size / TILE_SIZE]` int32, the slot of each tile of
            the pages; -1 for none. An entry may be set to -1 at any time.
        owner: `[num_kv_heads, num_slots]` int32, the tile that came to a slot last; -1 for none.
        stamp: `[num_kv_heads, num_slots]` int32, the step that read a slot last; 0 where none did
            since the hand passed.
        state: `[num_kv_heads, 3]` int32: steps so far, the slot under the hand, and how many
            entries of `loads` the last step made.
        loads: `[num_kv_heads, num_slots, 2]` int32, slot and tile of what the last step loaded.
        counts: `[num_kv_heads, 2]` int64, tiles that all steps needed, and that they loaded.
    """

    tiles: Tensor
    where: Tensor
    owner: Tensor
    stamp: Tensor
    state: Tensor
    loads: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, num_slots: int, num_tiles: int, k: Tensor) -> TileArena:
        """An arena of `num_slots` slots a head for pages of `num_tiles` tiles a head.

        k: `[..., num_kv_heads, head_dim]`, keys as the tiles will hold them.
        """
        heads, dim = k.shape[-2:]

        def ints(*shape: int, value: int = 0) -> Tensor:
            return torch.full((heads, *shape), value, dtype=torch.int32, device=k.device)

        return cls(
            tiles=k.new_empty((heads, num_slots, 2, TILE_SIZE, dim)),
            where=ints(num_tiles, value=-1),
            owner=ints(num_slots, value=-1),
            stamp=ints(num_slots),
            state=ints(3),
            loads=ints(num_slots, 2),
            counts=torch.zeros(heads, 2, dtype=torch.int64, device=k.device),
        )

    @property
    def num_slots(self) -> int:
        """Tiles of every head that fit."""
        return self.tiles.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tiles and the tables."""
        tables = (self.where, self.owner, self.stamp, self.state, self.loads, self.counts)
        return self.tiles.nbytes + sum(x.nbytes for x in tables)


@dataclass(frozen=True, slots=True)
class KeyIndex:
    """What a search reads of one layer's keys, in the same pages as the keys.

    An index describes keys and does not own them: a search never touches a `KeyPool`. Of keys in
    fp8 it describes what pages hold, without `k_scale`: a positive factor changes no order.

    Attributes:
        codes: `[num_pages, page_size, num_kv_heads, head_dim]`: a code of every key, which orders
            the candidates of a search. With 16 bits the key itself: the pool's `k_cache`; with 4 or
            8 bits int8, and head_dim * code_bits / 8 bytes instead of head_dim numbers
            (`hipserve.ops.codes`).
        summaries: `[num_pages, runs_per_page, num_kv_heads, 2, head_dim]`: center and radius
            of each run of keys (`bound_offsets` gives the places of the levels), or None
            for a search that reads none. In the dtype of the keys, bfloat16 of those in fp8; int8
            codes beside short codes.
        run_size: keys of the finest run.
        code_bits: bits of a channel of a key: 4, 8 or 16.
        code_scales: `[num_pages, page_size, num_kv_heads]` bfloat16, beside short codes.
        summary_scales: `[num_pages, runs_per_page, num_kv_heads, 2]` bfloat16, likewise.
    """

    codes: Tensor
    summaries: Tensor | None = None
    run_size: int = 16
    code_bits: int = 16
    code_scales: Tensor | None = None
    summary_scales: Tensor | None = None

    @property
    def page_size(self) -> int:
        return self.codes.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.codes.shape[2]

    @property
    def head_dim(self) -> int:
        width = self.codes.shape[3]
        return width if self.code_scales is None else width * 8 // self.code_bits

    @property
    def num_runs(self) -> int:
        """Runs of a page that have a summary."""
        return 0 if self.summaries is None else self.summaries.shape[1]

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Short codes and their scales, summaries and theirs, `[num_pages, ...]` each or None."""
        codes = None if self.code_scales is None else self.codes
        return codes, self.code_scales, self.summaries, self.summary_scales

    def tensors(self) -> list[Tensor]:
        """What an index holds beside the keys themselves: the `parts` `[num_pages, ...]` it has."""
        return [x for x in self.parts if x is not None]


@dataclass(frozen=True, slots=True)
class BlockSelection:
    """What each query block reads between the sinks and its window.

    Attributes:
        indices: `[num_query_blocks, heads, max_selected]` int32, key-block indices ascending, then
            -1 to the end; `heads` is `num_kv_heads`, or `num_q_heads` without `share_group`.
        window_start: `[num_query_blocks]` int32, first key of the contiguous window. It belongs to
            the selection: reused in later decode steps, the window grows from here, and no key
            falls between selection and window.
    """

    indices: Tensor
    window_start: Tensor

    def rows(self, order: Tensor) -> BlockSelection:
        """Entry i is the former entry `order[i]`; order: `[n]` int64."""
        return BlockSelection(self.indices[order], self.window_start[order])

    def keys_read(self, layout: BatchLayout, config: HiPConfig) -> tuple[Tensor, Tensor]:
        """Keys that all rows read, mean over heads, and keys that dense attention would read.

        Both are `[]` float64 on the device of `indices`. `layout` is the batch of this call,
        which may be later than the one that the selection was made for.
        """
        return self.keys_of(layout.query_blocks(config.query_block_size), config)

    def keys_of(self, query_blocks: Tensor, config: HiPConfig) -> tuple[Tensor, Tensor]:
        """`keys_read` of the rows of some blocks, one for each of the selection's.

        query_blocks: `[num_query_blocks, 4]`, as from `BatchLayout.query_blocks`.
        """
        blocks = query_blocks.double()
        rows, position = blocks[:, 2], blocks[:, 3]
        chosen = (self.indices >= 0).sum((1, 2), dtype=torch.float64)
        chosen *= config.key_block_size / self.indices.shape[1]
        left = (self.window_start - config.num_sink_tokens).clamp(min=0) - chosen
        dense = (rows * (position + (rows + 1) / 2)).sum()
        return dense - rows @ left, dense


def __getattr__(name: str) -> object:
    if name == "PagedKV":
        raise AttributeError(
            "hipserve.types.PagedKV became KeyPool(k_cache, v_cache), which attention reads, and "
            "KeyIndex(codes, summaries, run_size), which a search reads; hipserve.ops.build_index "
            "makes the second"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
