"""Pages whose keys and values are in a mapped file: the CPU's tier of offloading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hipserve.cache.host import FileMemory
from hipserve.cache.staging import pool_of
from hipserve.cache.store import Write, empty_index, grown, larger_index, ordinary_tensors
from hipserve.config import HiPConfig, IndexForm
from hipserve.errors import FitError
from hipserve.offload import TILE_SIZE, format_bytes, page_bytes
from hipserve.ops import write_kv
from hipserve.plan import BatchLayout
from hipserve.types import BlockSelection, KeyPool


def host_pages(memory: Tensor, page_size: int, k: Tensor) -> Tensor:
    """`[num_pages, num_kv_heads, 2, page_size, head_dim]`: as many pages as fit.

    Args:
        memory: `[nbytes]` uint8.
        page_size: keys in a page.
        k: `[..., num_kv_heads, head_dim]`, keys as the pages hold them.

    Raises:
        FitError: not even one does.
    """
    heads, dim = k.shape[-2:]
    nbytes = page_bytes(heads, page_size, dim, k.element_size())
    count = memory.numel() // nbytes
    if not count:
        found = f"a page of a layer takes {format_bytes(nbytes)}"
        share = f"its share of host_memory is {format_bytes(memory.numel())}"
        raise FitError(f"{found}, and {share}", "raise host_memory")
    numbers = memory[: count * nbytes].view(k.dtype)
    return numbers.view(count, heads, 2, page_size, dim)


class MappedPages:
    """Keys and values in a mapped file, their index in memory: a `PageStore`.

    What the operating system keeps of the file in memory is the cache of tiles. `fetch` asks for
    all that a step reads at once, so a disk has many requests to work on, and not one fault.

    Attributes:
        last_read_bytes: what the last step needed of the file.
    """

    def __init__(self, page_size: int, form: IndexForm, k: Tensor, memory: FileMemory) -> None:
        self.page_size, self.form = page_size, form
        self._memory, self._pages = memory, host_pages(memory.tensor(), page_size, k)
        self.pool = pool_of(self._pages)
        self.index = empty_index(0, page_size, form, self.pool.k_cache)
        self._held = self.last_read_bytes = 0
        self.sequences: Sequence[Write] = ()

    @property
    def host_nbytes(self) -> int:
        return self._held * self._pages[0].nbytes

    @property
    def device_nbytes(self) -> int:
        return sum(x.nbytes for x in self.index.tensors())

    @ordinary_tensors
    def grow(self, held: int, wanted: int, k: Tensor) -> int:  # noqa: ARG002
        """As `PageStore.grow`; k `[..., num_kv_heads, head_dim]`. Only the index moves.

        Raises:
            FitError: the file may not grow so far, or the disk is full.
        """
        capacity = self._pages.shape[0]
        check_room(wanted, capacity, self.page_size)
        count = min(grown(held, wanted, self.page_size), capacity)
        self._memory.reserve(count * self._pages[0].nbytes)
        self.index = larger_index(self.index, held, count, self.form, self.pool.k_cache)
        self._held = count
        return count

    def hold(self, count: int) -> None:
        """As `HostedStore.hold`.

        Raises:
            FitError: the file may not grow so far, or the disk is full.
        """
        check_room(count, self._pages.shape[0], self.page_size)
        self._memory.reserve(count * self._pages[0].nbytes)
        self._held = count

    def write(self, k: Tensor, v: Tensor, slots: Tensor, writes: Sequence[Write]) -> None:  # noqa: ARG002
        """As `PageStore.write`; k, v `[num_tokens, num_kv_heads, head_dim]`, slots
        `[num_tokens]`."""
        write_kv(k, v, self.pool, self.index, slots, check=False)

    @ordinary_tensors
    def copy(self, source: int, target: int) -> None:
        for pages in (self._pages, *self.index.tensors()):
            pages[target] = pages[source]

    def count_loads(self) -> tuple[int, int]:
        return 0, 0  # the operating system loads, and does not tell

    def fetch(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,
        config: HiPConfig,
        *_: object,
    ) -> KeyPool:
        heads, planes, size, dim = self._pages.shape[1:]
        stretches = stretches_read(selection, layout, config, heads, size)
        per_row, row = -(-size // TILE_SIZE), dim * self._pages.element_size()
        in_pages = stretches // per_row * planes * per_row + stretches % per_row
        both = torch.cat([in_pages + plane * per_row for plane in range(planes)])

        def start(i: int) -> int:
            return (i // per_row * size + i % per_row * TILE_SIZE) * row

        ranges = [(start(begin), start(end)) for begin, end in ranges_of(both)]
        self.last_read_bytes = sum(end - begin for begin, end in ranges)
        self._memory.will_need(ranges)
        return self.pool


def check_room(wanted: int, capacity: int, page_size: int) -> None:
    """Raises FitError where `wanted` pages are more than there may be."""
    if wanted > capacity:
        found = f"{wanted * page_size} keys in pages of {page_size}"
        room = f"host_memory has room for {capacity * page_size} in every layer"
        raise FitError(f"{found} are needed, and {room}", "raise host_memory or shorten the text")


def ranges_of(ids: Tensor) -> list[tuple[int, int]]:
    """The ranges [begin, end) that one or more ids `[n]` int64, in any order, consist of."""
    ids, edge = ids.unique(), torch.ones(1, dtype=torch.bool)
    gaps = ids.diff() != 1
    first, last = torch.cat([edge, gaps]), torch.cat([gaps, edge])
    return list(zip(ids[first].tolist(), (ids[last] + 1).tolist(), strict=True))


def stretches_read(
    selection: BlockSelection | None,
    layout: BatchLayout,
    config: HiPConfig,
    heads: int,
    page_size: int,
) -> Tensor:
    """`[n]` int64: which `TILE_SIZE` keys are read, (page * heads + head) * stretches a page + i.

    More than one row a sequence is taken to read everything.

    Args:
        selection: what was chosen; None for everything.
        layout: the batch.
        config: what the selection was made with.
        heads: KV heads.
        page_size: keys in a page.
    """
    per_row = -(-page_size // TILE_SIZE)
    blocks = layout.query_blocks(config.query_block_size)
    every = torch.arange(heads * per_row)
    if selection is None or len(blocks) != layout.num_seqs:
        lengths = layout.seq_lens.tolist()
        tables = zip(layout.block_table, lengths, strict=True)
        pages = torch.cat([table[: -(-n // page_size)].long() for table, n in tables])
        return (pages.unique()[:, None] * heads * per_row + every).flatten()

    lists, step = selection.indices.shape[1], min(config.key_block_size, TILE_SIZE)
    inside = torch.arange(0, config.key_block_size, step)
    parts: list[Tensor] = []
    for block, (seq, _, rows, position) in enumerate(blocks.tolist()):
        list_of, at = (selection.indices[block] >= 0).nonzero(as_tuple=True)
        starts = selection.indices[block][list_of, at].long() * config.key_block_size
        positions, head = (starts[:, None] + inside), list_of[:, None] * heads // lists
        last, window = position + rows, int(selection.window_start[block])
        sinks = range(0, min(config.num_sink_tokens, last), TILE_SIZE)
        always = torch.tensor([*sinks, *range(window // TILE_SIZE * TILE_SIZE, last, TILE_SIZE)])
        for p, of in ((positions, head), (always[:, None], torch.arange(heads))):
            page = layout.block_table[seq, p // page_size].long()
            ids = (page * heads + of) * per_row + p % page_size // TILE_SIZE
            parts.append(ids.flatten())
    return torch.cat(parts)
