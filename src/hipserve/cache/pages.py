"""Pages of one layer for a batch of growing sequences: append, truncate, branch, account."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from hipserve.config import IndexForm
from hipserve.errors import ArgumentError
from hipserve.ops import checks, write_kv
from hipserve.ops.write_kv.layout import IndexLayout, Rows
from hipserve.plan import BatchLayout, runs_of_pages
from hipserve.types import KeyIndex, KeyPool

GROWTH = 0.25
"""Minimum share by which a full pool grows: copies stay rare."""

FEW_SLOTS = 64
"""Up to so many slots are computed one by one; more of them page by page."""

P = ParamSpec("P")
R = TypeVar("R")


def ordinary_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """Pages outlive the call that makes them: under `torch.inference_mode` they would be frozen."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **options)

    return wrapped


def empty_pages(
    count: int, page_size: int, form: IndexForm, like: Tensor
) -> tuple[KeyPool, KeyIndex]:
    """Pages for keys `[..., num_kv_heads, head_dim]` with the dtype and device of `like`.

    In memory a page holds one head after the other: a head reads its keys as one stretch, which
    is twice as fast on a CPU as picking them out between those of the other heads.
    """
    heads, dim = like.shape[-2:]

    def allocate(rows: Rows) -> Tensor:
        shape = (count, heads, rows.count, *rows.shape)
        return torch.empty(shape, dtype=rows.dtype, device=like.device).transpose(1, 2)

    pool = KeyPool(*(allocate(Rows(page_size, (dim,), like.dtype)) for _ in range(2)))
    layout = IndexLayout.of_pages(page_size, dim, like.dtype, form)
    return pool, layout.index(pool.k_cache, allocate)


class PagedLayer:
    """Keys and values of one layer, in pages that sequences own or share.

    A page is shared after sequences branch (beam search). A sequence that writes to a shared page
    copies that page first. Nothing else is copied, except when the pool grows.

    Args:
        page_size: keys in a page.
        run_size: keys of the finest run with a summary; None keeps no summaries.
        code_bits: bits of a channel of a key's code; 16 keeps no codes beside the keys.

    Raises:
        ArgumentError: runs would straddle pages; later, keys that do not fit.
    """

    def __init__(
        self, page_size: int = 256, run_size: int | None = 16, code_bits: int = 16
    ) -> None:
        checks.check_size("page_size", page_size)
        if run_size is not None:
            num_runs = runs_of_pages(page_size, run_size)
            checks.check_page_size(page_size, run_size, num_runs)
        self.page_size, self.form = page_size, IndexForm(run_size, code_bits)
        self.lengths: list[int] = []
        self._pages: tuple[KeyPool, KeyIndex] | None = None
        self._tables: list[list[int]] = []  # the pages of each sequence, in order
        self._owners: list[int] = []  # how many sequences hold each page
        self._block_table: Tensor | None = None  # the tables as a tensor, until they change

    @property
    def pool(self) -> KeyPool:
        """The keys and values, once some were appended."""
        return self._held()[0]

    @property
    def index(self) -> KeyIndex:
        """What a search reads of the same pages."""
        return self._held()[1]

    def _held(self) -> tuple[KeyPool, KeyIndex]:
        if self._pages is None:
            raise RuntimeError("the layer holds no keys yet; append some first")
        return self._pages

    def _tensors(self) -> list[Tensor]:
        """Keys, values and their index; those that exist."""
        if self._pages is None:
            return []
        pool, index = self._pages
        return [pool.k_cache, pool.v_cache, *index.tensors()]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their index, used or reserved."""
        return sum(x.nbytes for x in self._tensors())

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
        slots = self._slots(counts, k.device)
        if valid is None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        else:
            k, v = k[valid], v[valid]
        write_kv(k, v, self.pool, self.index, slots, check=False)
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]

    def _check(self, k: Tensor) -> None:
        """What is appended fits what is there."""
        if self.lengths and k.shape[0] != len(self.lengths):
            expected = f"the {len(self.lengths)} sequences that the cache holds"
            raise ArgumentError("batch", expected, str(k.shape[0]), "clear it or make a new one")
        if self._pages is not None:
            like = self.pool.k_cache
            if (k.dtype, k.device, k.shape[2:]) != (like.dtype, like.device, like.shape[2:]):
                expected = f"{like.dtype} on {like.device}, heads and head_dim {[*like.shape[2:]]}"
                got = f"{k.dtype} on {k.device}, {[*k.shape[2:]]}"
                raise ArgumentError("k", f"{expected}, as the cache holds", got, "make a new cache")

    def layout(self, query_lens: list[int]) -> BatchLayout:
        """The batch as operations take it, the last `query_lens` positions being the queries."""
        if self._block_table is None:
            columns = max(1, *map(len, self._tables))
            rows = [[*table, *[0] * (columns - len(table))] for table in self._tables]
            device = self.pool.k_cache.device
            self._block_table = torch.tensor(rows, dtype=torch.int32, device=device)
        return BatchLayout.of(self._block_table, self.lengths, query_lens)

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
        missing = [end - len(table) for end, table in zip(ends, self._tables, strict=True)]
        if self._pages is not None and not shared and not any(missing):
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
        """Pages without an owner; the pool grows if there are too few."""
        free = [page for page, owners in enumerate(self._owners) if not owners]
        if len(free) < count or self._pages is None:
            free += self._grow(k, count - len(free))
        for page in free[:count]:
            self._owners[page] = 1
        return iter(free[:count])

    @ordinary_tensors
    def _copy_page(self, source: int, target: int) -> int:
        self._owners[source] -= 1
        for pages in self._tensors():
            pages[target] = pages[source]
        return target

    @ordinary_tensors
    def _grow(self, k: Tensor, missing: int) -> range:
        """Moves the pages to a larger pool; returns the new ones."""
        held = len(self._owners)
        pool = held + max(missing, int(held * GROWTH), 4096 // self.page_size)
        held_pages = self._tensors()
        self._pages = empty_pages(pool, self.page_size, self.form, k)
        for new, old in zip(self._tensors(), held_pages, strict=False):
            new[:held] = old
        self._owners += [0] * (pool - held)
        return range(held, pool)

    def _slots(self, counts: list[int], device: torch.device) -> Tensor:
        """`[sum of counts]` int64: where the next `counts` keys of every sequence go."""
        size = self.page_size
        writes = list(zip(self._tables, self.lengths, counts, strict=True))
        if sum(counts) <= FEW_SLOTS:
            slots = tuple(
                table[position // size] * size + position % size
                for table, begin, count in writes
                for position in range(begin, begin + count)
            )
            return _few_slots(slots, device)
        inside = torch.arange(size, device=device)
        parts: list[Tensor] = []
        for table, begin, count in writes:
            pages = torch.tensor(table[begin // size : -(-(begin + count) // size)], device=device)
            every = (pages.long()[:, None] * size + inside).flatten()
            parts.append(every.narrow(0, begin % size, count))
        return torch.cat(parts)


@functools.lru_cache(16)
@ordinary_tensors
def _few_slots(slots: tuple[int, ...], device: torch.device) -> Tensor:
    """All layers of a step write to the same slots: made once, as making them waits for a GPU."""
    return torch.tensor(slots, dtype=torch.int64, device=device)
