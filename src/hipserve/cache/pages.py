"""Pages of one layer for a batch of growing sequences: append, truncate, branch, account."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hipserve.cache.store import PageStore, ResidentPages, Write, ordinary_tensors
from hipserve.cache.transfers import sent
from hipserve.config import HiPConfig, IndexForm
from hipserve.errors import ArgumentError
from hipserve.ops import checks
from hipserve.ops.write_kv.join_runs import join
from hipserve.plan import BatchLayout, PruningRule
from hipserve.plan.parts import num_runs_of
from hipserve.types import BlockSelection, KeyIndex, KeyPool

MakeStore = Callable[[int, IndexForm, Tensor], PageStore]
"""Takes a page size, what the index holds, and keys `[..., num_kv_heads, head_dim]`."""

FEW_SLOTS = 64
"""Up to so many slots are computed one by one; more of them page by page."""


class PagedLayer:
    """Keys and values of one layer, in pages that sequences own or share.

    A page is shared after sequences branch (beam search). A sequence that writes to a shared page
    copies that page first. Nothing else is copied, except when the memory of the pages grows.

    Args:
        page_size: keys in a page.
        run_size: keys of the finest run with a summary; None keeps no summaries.
        code_bits: bits of a channel of a key's code; 16 keeps no codes beside the keys.
        make_store: makes the memory of the pages with the first keys; by default on their device.

    Raises:
        ArgumentError: runs would straddle pages; later, keys that do not fit.
    """

    def __init__(
        self,
        page_size: int = 256,
        run_size: int | None = 16,
        code_bits: int = 16,
        make_store: MakeStore = ResidentPages,
    ) -> None:
        checks.check_size("page_size", page_size)
        self.page_size, self.form = page_size, IndexForm(run_size, code_bits)
        self._written_runs = num_runs_of(page_size, self.form)
        if run_size is not None:
            checks.check_page_size(page_size, run_size, self._written_runs)
        self.lengths: list[int] = []
        self._make_store = make_store
        self._store: PageStore | None = None
        self._device = torch.device("cpu")  # of the keys that are appended
        self._tables: list[list[int]] = []  # the pages of each sequence, in order
        self._owners: list[int] = []  # how many sequences hold each page
        self._block_table: Tensor | None = None  # the tables as a tensor, until they change

    @property
    def pool(self) -> KeyPool:
        """The keys and values, once some were appended."""
        return self.store.pool

    @property
    def index(self) -> KeyIndex:
        """What a search reads of the same pages."""
        return self.store.index

    @property
    def store(self) -> PageStore:
        """The memory of the pages, once some keys were appended."""
        if self._store is None:
            raise RuntimeError("the layer holds no keys yet; append some first")
        return self._store

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their index, used or reserved."""
        return self.host_nbytes + self.device_nbytes

    @property
    def host_nbytes(self) -> int:
        """Those of them that are offloaded."""
        return self._store.host_nbytes if self._store else 0

    @property
    def device_nbytes(self) -> int:
        """Those on the device of the keys."""
        return self._store.device_nbytes if self._store else 0

    def count_loads(self) -> tuple[int, int]:
        """Tiles that all steps needed, and that they had to load; zeros for pages elsewhere."""
        return self._store.count_loads() if self._store else (0, 0)

    def fetch(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,
        config: HiPConfig,
        rule: PruningRule | None,
    ) -> KeyPool:
        """Keys and values in which the chosen ones are present, and those that are always read.

        Args:
            selection: made with `config` and `rule`; None for everything.
            layout: from this layer.
            config: block sizes, sinks and window of the selection.
            rule: which rows are pruned; None for none.
        """
        return self.store.fetch(selection, layout, config, rule)

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Appends k and v, `[batch, new, num_kv_heads, head_dim]` each.

        Tokens where valid `[batch, new]` bool is False (padding) are left out: sequences of a batch
        may differ in length.
        """
        batch, new = k.shape[:2]
        self._check(k)
        if not self.lengths:
            self.lengths, self._tables = [0] * batch, [[] for _ in range(batch)]
        counts = [new] * batch if valid is None else valid.sum(1).tolist()
        self._reserve(k, counts)
        lengths = zip(self._tables, self.lengths, counts, strict=True)
        writes = [Write(table, begin, begin + count) for table, begin, count in lengths]
        slots = self._slots(writes, k.device)
        if valid is None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        else:
            k, v = k[valid], v[valid]
        self.store.write(k, v, slots, writes)
        self.advance(counts)

    def reserve(self, counts: list[int]) -> None:
        """Gives every sequence pages for so many more keys, which someone else writes there."""
        self._reserve(self.pool.k_cache, counts)

    def advance(self, counts: list[int]) -> None:
        """So many keys more were written of every sequence."""
        known = self.lengths
        self.lengths = [n + c for n, c in zip(known, counts, strict=True)]
        self._join(known)

    def _join(self, known: list[int]) -> None:
        """Joins the long runs behind so many keys of every sequence, where the index has any."""
        if self.index.num_runs > self._written_runs:
            join(self.index, self.block_table, self.lengths, known)

    def _check(self, k: Tensor) -> None:
        """What is appended fits what is there."""
        if self.lengths and k.shape[0] != len(self.lengths):
            expected = f"the {len(self.lengths)} sequences that the cache holds"
            raise ArgumentError("batch", expected, str(k.shape[0]), "clear it or make a new one")
        if self._store is not None:
            like, device = self.pool.k_cache, self._device
            if (k.dtype, k.device, k.shape[2:]) != (like.dtype, device, like.shape[2:]):
                expected = f"{like.dtype} on {device}, heads and head_dim {[*like.shape[2:]]}"
                got = f"{k.dtype} on {k.device}, {[*k.shape[2:]]}"
                raise ArgumentError("k", f"{expected}, as the cache holds", got, "make a new cache")

    def layout(self, query_lens: list[int]) -> BatchLayout:
        """The batch as operations take it, the last `query_lens` positions being the queries."""
        return BatchLayout.of(self.block_table, self.lengths, query_lens)

    @property
    def block_table(self) -> Tensor:
        """`[num_seqs, columns]` int32: pages of each sequence in order; the same tensor until they
        change."""
        if self._block_table is None:
            columns = max(1, *map(len, self._tables))
            rows = [[*table, *[0] * (columns - len(table))] for table in self._tables]
            self._block_table = sent(rows, self._device).int()
        return self._block_table

    def shares_table(self, other: PagedLayer) -> bool:
        """Its sequences have the same pages as those of `other`."""
        return self._tables == other._tables

    def truncate(self, count: int) -> None:
        """Forgets the last `count` keys of every sequence."""
        self._hold([max(n - count, 0) for n in self.lengths], self._tables)

    def reorder(self, order: Tensor) -> None:
        """Sequence i continues what was sequence `order[i]`; pages are shared, not copied.

        order: `[batch]` int64.
        """
        sources: list[int] = order.tolist()
        self._hold([self.lengths[i] for i in sources], [self._tables[i] for i in sources])

    def clear(self) -> None:
        """Forgets all sequences; the pages stay."""
        self._hold([], [])

    def _hold(self, lengths: list[int], tables: list[list[int]]) -> None:
        """Sequences of these lengths hold the first pages of these tables, and no others."""
        held = [table[: self._used(n)] for n, table in zip(lengths, tables, strict=True)]
        self.lengths, self._tables, self._block_table = lengths, held, None
        self._owners = [0] * len(self._owners)
        for page in itertools.chain.from_iterable(held):
            self._owners[page] += 1

    def _used(self, length: int) -> int:
        return -(-length // self.page_size)

    def _reserve(self, k: Tensor, counts: list[int]) -> None:
        """Gives every sequence its own pages for the keys that it is about to write."""
        shared = [seq for seq, count in enumerate(counts) if count and self._shares(seq)]
        ends = [self._used(n + count) for n, count in zip(self.lengths, counts, strict=True)]
        missing = [max(end - len(t), 0) for end, t in zip(ends, self._tables, strict=True)]
        if self._store is not None and not shared and not any(missing):
            return
        free = self._take(len(shared) + sum(missing), k)
        for seq in shared:
            self._tables[seq][-1] = self._copy_page(self._tables[seq][-1], next(free))
        for table, count in zip(self._tables, missing, strict=True):
            table.extend(itertools.islice(free, count))
        self._block_table = None

    def _shares(self, seq: int) -> bool:
        """Its last page has room left, and another sequence holds it too."""
        partial = self.lengths[seq] % self.page_size > 0
        return partial and self._owners[self._tables[seq][-1]] > 1

    def _take(self, count: int, k: Tensor) -> Iterator[int]:
        """Pages without an owner; the memory grows if there are too few."""
        free = [page for page, owners in enumerate(self._owners) if not owners]
        if len(free) < count or self._store is None:
            free += self._grow(k, count - len(free))
        for page in free[:count]:
            self._owners[page] = 1
        return iter(free[:count])

    def _copy_page(self, source: int, target: int) -> int:
        self._owners[source] -= 1
        self.store.copy(source, target)
        return target

    @ordinary_tensors
    def _grow(self, k: Tensor, missing: int) -> range:
        """Makes room for more pages; returns the new ones."""
        held = len(self._owners)
        if self._store is None:
            self._store, self._device = self._make_store(self.page_size, self.form, k), k.device
        num_runs = self.index.num_runs
        count = self._store.grow(held, held + missing, k)
        if self.index.num_runs > num_runs:  # it got deeper
            self._join([0] * len(self.lengths))
        self._owners += [0] * (count - held)
        return range(held, count)

    def _slots(self, writes: Sequence[Write], device: torch.device) -> Tensor:
        """`[num_tokens]` int64: where the keys of these writes go."""
        size = self.page_size
        if sum(end - begin for _, begin, end in writes) <= FEW_SLOTS:
            slots = tuple(
                table[position // size] * size + position % size
                for table, begin, end in writes
                for position in range(begin, end)
            )
            return _few_slots(slots, device)
        inside = torch.arange(size, device=device)
        parts: list[Tensor] = []
        for table, begin, end in writes:
            pages = sent(table[begin // size : -(-end // size)], device)
            every = (pages[:, None] * size + inside).flatten()
            parts.append(every.narrow(0, begin % size, end - begin))
        return torch.cat(parts)


@functools.lru_cache(16)
@ordinary_tensors
def _few_slots(slots: tuple[int, ...], device: torch.device) -> Tensor:
    """All layers of a step write to the same slots: made once, as making them waits for a GPU."""
    return torch.tensor(slots, dtype=torch.int64, device=device)
