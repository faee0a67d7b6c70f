"""Pages whose keys and values are in host memory, and the tiles of them that a GPU holds."""

from __future__ import annotations

import bisect
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
from hipserve.offload import FEW_PAGES, TILE_SIZE, format_bytes, slot_bytes, tiles_of_rows
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

    Host memory always has all rows. A step of few rows writes them there, and to their tiles where
    these are resident; it loads the tiles that it reads. Longer chunks stage whole sequences.

    Attributes:
        index: of the pages; whoever keeps it elsewhere (`hold`) puts it here.
        sequences: what `fetch` reads: those that were written last, unless set.

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
        self.arena, self._staging = TileArena.empty(slots, 0, k), staging
        staging.join(self)
        self.sequences: Sequence[Write] = ()
        self._leaving = set[int]()  # pages that may be on their way to the host

    @property
    def host_nbytes(self) -> int:
        return self._held * self._host[0].nbytes

    @property
    def device_nbytes(self) -> int:
        index = sum(x.nbytes for x in self.index.tensors())
        return index + self.arena.nbytes

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
        if count > self.arena.where.shape[1] * TILE_SIZE // self.page_size:
            room = min(max(grown(held, wanted, self.page_size), count), capacity)
            self.index = larger_index(self.index, held, room, self.form, self.pool.k_cache)
            self._make_table(room)
        return count

    @ordinary_tensors
    def hold(self, count: int) -> None:
        """As `HostedStore.hold`.

        Raises:
            FitError: host_memory has no room for so much.
        """
        check_room(count, self._host.shape[0], self.page_size)
        self._reserve(count)
        self._make_table(count)

    def _make_table(self, room: int) -> None:
        """Says of the tiles of so many pages where they are."""
        where = self.arena.where
        table = where.new_full((where.shape[0], room * self.page_size // TILE_SIZE), -1)
        table[:, : where.shape[1]] = where
        self.arena = replace(self.arena, where=table)

    def _reserve(self, count: int) -> None:
        """Whole pages at a time: a copy of pages is within what was reserved together."""
        page_bytes = self._host[0].nbytes
        most = max(PIECE // page_bytes, 1)
        for begin in range(self._held, count, most):
            self._memory.reserve(min(begin + most, count) * page_bytes)
            self._cuts.append(begin)
        self._held = max(count, self._held)

    def write(self, k: Tensor, v: Tensor, slots: Tensor, writes: Sequence[Write]) -> None:
        """As `PageStore.write`; k, v `[num_tokens, num_kv_heads, head_dim]`, slots
        `[num_tokens]`."""
        self.sequences = writes
        size, changed = self.page_size, list[int]()
        few = apart = True
        for table, begin, end in writes:
            first, last = begin // size, -(-end // size)
            if begin < end:
                changed += table[first:last]
                few = few and last - first <= FEW_PAGES
                apart = apart and end - begin == 1
        if few:
            self._arrive()
            self.write_few(k, v, slots, apart=apart)
            self._staging.forget(self, changed)
            return
        self._forget(changed)
        staged = self._stage(self._written())
        write_kv(k, v, staged.pool, self.index, slots, backend=self.backend, check=False)
        self._staging.store(staged, changed, self.host)
        self._leaving.update(changed)

    def settle(self) -> None:
        """Comes before `write_few` and `load` where nothing else does, since a graph repeats them:
        pages on the host have what was stored, and their staged copies are out of date."""
        self._arrive()
        self._staging.drop(self)

    def write_few(self, k: Tensor, v: Tensor, slots: Tensor, *, apart: bool = True) -> None:
        """Launches what writes rows to pages of the host, and to their tiles.

        Args:
            k, v: `[num_tokens, num_kv_heads, head_dim]`, on `FEW_PAGES` of every sequence at most.
            slots: `[num_tokens]` int64, as in `store_rows`.
            apart: every sequence has a single row.
        """
        write_kv(
            k,
            v,
            self.pool,
            self.index,
            slots,
            backend=self.backend,
            whole_runs=True,
            apart=apart,
            check=False,
        )
        store_rows(k, v, self.arena, self.host.pages, slots, backend=self.backend)

    def load(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,
        config: HiPConfig,
        max_tiles: int,
    ) -> KeyPool:
        """Launches what makes the tiles present that are read: no more than the arena has.

        max_tiles: maximum of a query block and head.
        """
        return load_tiles(
            self.arena,
            self.host.pages,
            layout,
            selection,
            config=config,
            max_tiles=-(-max_tiles // 16) * 16,
            backend=self.backend,
            check=False,
        )

    def _arrive(self) -> None:
        """What is launched from here on finds on the host what was stored."""
        self._staging.wait()
        self._leaving.clear()

    @property
    def host(self) -> HostPages:
        """All pages, in memory of the host."""
        return HostPages(self._host[: self._held], self._cuts)

    def _written(self) -> set[int]:
        """Pages that have rows from before."""
        return {
            p for table, begin, _ in self.sequences for p in table[: -(-begin // self.page_size)]
        }

    def _stage(self, written: set[int]) -> StagedPages:
        """All pages of the sequences; those without rows from before are not copied."""
        every = [p for table, _, end in self.sequences for p in table[: -(-end // self.page_size)]]
        return self._staging.stage(self, [*dict.fromkeys(every)], written)

    def _forget(self, pages: list[int]) -> None:
        """Tiles of these pages are out of date."""
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
        if not fits or not reads.few(config.query_block_size):
            return self._stage({p for table, _, _ in self.sequences for p in table}).pool
        if not self._leaving.isdisjoint(p for table, _, _ in self.sequences for p in table):
            self._arrive()
        self._staging.release()
        return self.load(selection, layout, config, reads.most_tiles)

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


def most_row_tiles(config: HiPConfig, rule: PruningRule, longest: int) -> int:
    """Maximum tiles of a head that a single row reads, of a sequence of up to `longest` keys: the
    last row that is not pruned, or one that is."""
    age = config.refresh_interval - 1
    pruned = bisect.bisect_left(range(longest), True, key=lambda p: rule.prunes(p - age, 1))
    return max(_tiles_of(p, 1, config, rule) for p in {max(pruned - 1, 0), longest - 1})


class TilesRead(NamedTuple):
    """What the query blocks of a step read.

    Attributes:
        blocks: how many query blocks.
        rows: of all of them.
        most_tiles: maximum tiles of a head that one reads.
        total: of all blocks.
    """

    blocks: int = 0
    rows: int = 0
    most_tiles: int = 0
    total: int = 0

    @classmethod
    def of(cls, layout: BatchLayout, config: HiPConfig, rule: PruningRule | None) -> TilesRead:
        """Without a rule, every block reads all keys."""
        return cls.of_blocks(layout.host_blocks(config.query_block_size), config, rule)

    @classmethod
    def of_blocks(
        cls, blocks: Sequence[Sequence[int]], config: HiPConfig, rule: PruningRule | None
    ) -> TilesRead:
        """The same of query blocks as `BatchLayout.host_blocks` has them."""
        tiles = [_tiles_of(position, rows, config, rule) for _, _, rows, position in blocks]
        return cls(len(blocks), sum(rows for _, _, rows, _ in blocks), max(tiles), sum(tiles))

    def beside(self, other: TilesRead) -> TilesRead:
        """What both read."""
        most = max(self.most_tiles, other.most_tiles)
        sums = self.blocks + other.blocks, self.rows + other.rows
        return TilesRead(*sums, most, self.total + other.total)

    def few(self, query_block_size: int) -> bool:
        """No block has more than `TILED_ROWS` rows, for any split of so many into so many."""
        return min(query_block_size, self.rows - self.blocks + 1) <= TILED_ROWS


def _tiles_of(position: int, rows: int, config: HiPConfig, rule: PruningRule | None) -> int:
    """Maximum tiles of a head that the query block of so many rows from `position` on reads."""
    every = -(-(position + rows) // TILE_SIZE)
    # a row may use a selection from before it was pruned
    age = config.refresh_interval - 1 if rows == 1 else 0
    if rule is None or not rule.prunes(position - age, rows):
        return every
    return min(every, row_tiles(config, 0 if rows == 1 else rows))
