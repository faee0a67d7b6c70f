"""Pages whose keys and values are in host memory, and the tiles of them that a GPU holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hipserve.cache.host import PIECE
from hipserve.cache.mapped import check_room, host_pages
from hipserve.cache.staging import HostPages, StagedPages, Staging, pool_of
from hipserve.cache.store import Write, empty_index, grown, larger_index, ordinary_tensors
from hipserve.cache.transfers import sent
from hipserve.config import HiPConfig, IndexForm
from hipserve.errors import FitError
from hipserve.offload import TAIL_PAGES, TILE_SIZE, format_bytes, slot_bytes, tiles_of_rows
from hipserve.ops import load_tiles, store_rows, write_kv
from hipserve.plan import BatchLayout, PruningRule
from hipserve.types import BlockSelection, KeyPool, TileArena

TILED_ROWS = 16
"""Rows of a query block up to which attention reads tiles. On Hopper more rows have another kernel,
which reads pages only and rounds differently: they read staged pages, as resident ones."""


AHEAD = 4096
"""Keys for which host memory is taken ahead: taking it is slow, and moves nothing."""


class Memory(Protocol):
    """Memory of the host that the device reads and writes."""

    def tensor(self) -> Tensor:
        """All bytes `[nbytes]` uint8."""
        ...

    def reserve(self, nbytes: int) -> None:
        """Makes the first `nbytes` bytes usable, those that were not before for copies of their
        own."""
        ...


class TiledPages:
    """Keys and values in host memory, their index and some tiles on the device: a `PageStore`.

    Host memory always has all rows. A step of few rows writes them there, to their tiles where
    these are resident, and to the last pages of its sequences, whose copies on the device the index
    is made from; it loads the tiles that it reads. Longer chunks stage whole sequences.

    Args:
        page_size, form: as in `PagedLayer`.
        k: `[..., num_kv_heads, head_dim]`, keys as the pages will hold them.
        memory: of the host.
        device_bytes: for tiles.
        staging: shared by all layers of a cache, which are made in the order they compute in.
        floor: tiles of a head that one row reads.
        backend: of the operations.

    Raises:
        FitError: no row would fit, or no page.
    """

    def __init__(
        self,
        page_size: int,
        form: IndexForm,
        k: Tensor,
        *,
        memory: Memory,
        device_bytes: int,
        staging: Staging,
        floor: int,
        backend: str = "auto",
    ) -> None:
        self.page_size, self.form, self.backend = page_size, form, backend
        self._memory, self._host = memory, host_pages(memory.tensor(), page_size, k)
        self.pool = pool_of(self._host)
        self.index = empty_index(0, page_size, form, self.pool.k_cache, k.device)
        self._held, self._cuts = 0, list[int]()
        slot = slot_bytes(k.shape[-2], k.shape[-1], k.element_size())
        slots = device_bytes // slot
        if slots < floor:
            least = floor * slot
            needs = f"a row reads {floor} tiles of a head, {format_bytes(least)} in this layer"
            raise FitError(
                f"{needs}, and its share of device_memory is {format_bytes(device_bytes)}",
                "raise device_memory, or lower budget or sliding_window",
            )
        self.arena = TileArena.empty(slots, 0, k)
        self._tail, self._staging = StagedPages(page_size, k), staging
        staging.join(self)
        self._writes: Sequence[Write] = ()

    @property
    def host_nbytes(self) -> int:
        return self._held * self._host[0].nbytes

    @property
    def device_nbytes(self) -> int:
        index = sum(x.nbytes for x in self.index.tensors())
        return index + self.arena.nbytes + self._tail.nbytes

    @ordinary_tensors
    def grow(self, held: int, wanted: int, k: Tensor) -> int:  # noqa: ARG002
        """As `PageStore.grow`; k `[..., num_kv_heads, head_dim]`. Index and table move.

        Raises:
            FitError: host_memory has no room for so much.
        """
        capacity = self._host.shape[0]
        check_room(wanted, capacity, self.page_size)
        count = min(wanted + AHEAD // self.page_size, capacity)
        self._reserve(count)
        per_page, where = self.page_size // TILE_SIZE, self.arena.where
        if count * per_page > where.shape[1]:
            room = min(max(grown(held, wanted, self.page_size), count), capacity)
            self.index = larger_index(self.index, held, room, self.form, self.pool.k_cache)
            table = where.new_full((where.shape[0], room * per_page), -1)
            table[:, : where.shape[1]] = where
            self.arena = replace(self.arena, where=table)
        self._held = count
        return count

    def _reserve(self, count: int) -> None:
        """Whole pages at a time: a copy of pages is within what was reserved together."""
        page_bytes = self._host[0].nbytes
        most = max(PIECE // page_bytes, 1)
        for begin in range(self._held, count, most):
            self._memory.reserve(min(begin + most, count) * page_bytes)
            self._cuts.append(begin)

    def write(self, k: Tensor, v: Tensor, slots: Tensor, writes: Sequence[Write]) -> None:
        """As `PageStore.write`; k, v `[num_tokens, num_kv_heads, head_dim]`, slots
        `[num_tokens]`."""
        self._writes = writes
        size, changed = self.page_size, list[int]()
        few = True
        for table, begin, end in writes:
            first, last = begin // size, -(-end // size)
            if begin < end:
                changed += table[first:last]
                few = few and last - first <= TAIL_PAGES
        if few:
            self._staging.wait()
            if not self._tail.holds(changed, self.host):
                self._tail.hold(changed, self.host, self._written())
            write_kv(k, v, self._tail.pool, self.index, slots, backend=self.backend, check=False)
            store_rows(k, v, self.arena, self.host.pages, slots, backend=self.backend)
            self._staging.forget(self, changed)
            return
        self._forget(changed)
        staged = self._stage(self._written())
        write_kv(k, v, staged.pool, self.index, slots, backend=self.backend, check=False)
        self._staging.store(staged, changed, self.host)

    @property
    def host(self) -> HostPages:
        """All pages, in memory of the host."""
        return HostPages(self._host[: self._held], self._cuts)

    def _written(self) -> set[int]:
        """Pages that have rows from before."""
        return {p for table, begin, _ in self._writes for p in table[: -(-begin // self.page_size)]}

    def _stage(self, written: set[int]) -> StagedPages:
        """All pages of the sequences; those without rows from before are not copied."""
        every = [p for table, _, end in self._writes for p in table[: -(-end // self.page_size)]]
        return self._staging.stage(self, [*dict.fromkeys(every)], written)

    def _forget(self, pages: list[int]) -> None:
        """Tiles and copies of these pages are out of date."""
        self._tail.forget(pages)
        per_page = self.page_size // TILE_SIZE
        where = self.arena.where.view(len(self.arena.where), -1, per_page)
        where.index_fill_(1, sent(pages, where.device), -1)  # to assign would wait for the device

    @ordinary_tensors
    def copy(self, source: int, target: int) -> None:
        if self.arena.tiles.is_cuda:
            torch.cuda.synchronize(self.arena.tiles.device)  # the host copies, and kernels write
        self._host[target] = self._host[source]
        for pages in self.index.tensors():
            pages[target] = pages[source]
        self._forget([target])
        self._staging.forget(self, [target])

    def fetch(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,
        config: HiPConfig,
        rule: PruningRule | None,
    ) -> KeyPool:
        group = 1
        if selection is not None:
            group = selection.indices.shape[1] // self.arena.tiles.shape[0]
        rule = rule if selection is not None else None
        asked = ("tiles", config, rule)
        reads = layout.once(asked, lambda: TilesRead.of(layout, config, rule))
        fits = reads.total * group <= self.arena.num_slots
        if not fits:
            self._check_rows(reads, group, layout, config)
        if not fits or reads.most_rows > TILED_ROWS:
            return self._stage({p for table, _, _ in self._writes for p in table}).pool
        self._staging.release()
        return load_tiles(
            self.arena,
            self.host.pages,
            layout,
            selection,
            config=config,
            max_tiles=-(-reads.most_tiles // 16) * 16,
            backend=self.backend,
            check=False,
        )

    def _check_rows(
        self, reads: TilesRead, group: int, layout: BatchLayout, config: HiPConfig
    ) -> None:
        """Raises FitError where single rows, all of them pruned, are too many for the arena."""
        pruned = row_tiles(config)
        if reads.blocks == layout.num_seqs and reads.most_tiles <= pruned:
            needs = f"{reads.blocks} rows that read {pruned} tiles of a head each"
            room = f"device_memory has room for {self.arena.num_slots} in every layer"
            raise FitError(
                f"{needs}, {group} times, and {room}",
                "raise device_memory, or decode fewer sequences at a time",
            )

    def count_loads(self) -> tuple[int, int]:
        needed, loaded = self.arena.counts.sum(0).tolist()
        return needed, loaded


def row_tiles(config: HiPConfig, rows: int = 0) -> int:
    """Maximum tiles of a head that a pruned query block reads; rows 0: one that decodes."""
    return tiles_of_rows(
        config.num_sink_tokens,
        config.max_selected * config.key_block_size,
        config.sliding_window,
        config.granularity,
        rows or config.refresh_interval,
    )


class TilesRead(NamedTuple):
    """What the query blocks of a step read.

    Attributes:
        blocks: how many query blocks.
        most_rows: maximum rows of one, for any split of so many rows into so many blocks.
        most_tiles: maximum tiles of a head that one reads.
        total: of all blocks.
    """

    blocks: int
    most_rows: int
    most_tiles: int
    total: int

    @classmethod
    def of(cls, layout: BatchLayout, config: HiPConfig, rule: PruningRule | None) -> TilesRead:
        """Without a rule, every block reads all keys."""
        blocks = layout.host_blocks(config.query_block_size)
        rows = sum(rows for _, _, rows, _ in blocks)
        tiles = [_tiles_of(position, rows, config, rule) for _, _, rows, position in blocks]
        most_rows = min(config.query_block_size, rows - len(blocks) + 1)
        return cls(len(blocks), most_rows, max(tiles), sum(tiles))


def _tiles_of(position: int, rows: int, config: HiPConfig, rule: PruningRule | None) -> int:
    """Maximum tiles of a head that the query block of so many rows from `position` on reads."""
    every = -(-(position + rows) // TILE_SIZE)
    # a row may use a selection from before it was pruned
    age = config.refresh_interval - 1 if rows == 1 else 0
    if rule is None or not rule.prunes(position - age, rows):
        return every
    return min(every, row_tiles(config, 0 if rows == 1 else rows))
