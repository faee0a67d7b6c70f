"""Pages of one layer for a batch of growing sequences: append, truncate, branch, account."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from hipserve.ops import write_kv
from hipserve.types import BatchLayout, PagedKV, bound_offsets

GROWTH = 0.25
"""A pool that is full grows by this share at least, so that copies stay rare."""

P = ParamSpec("P")
R = TypeVar("R")


def ordinary_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """Pages outlive the call that makes them: under `torch.inference_mode` they would be frozen."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **options)

    return wrapped


def empty_pages(pool: int, page_size: int, bound_block_size: int | None, like: Tensor) -> PagedKV:
    """Pages for keys `[..., num_kv_heads, head_dim]` with the dtype and device of `like`.

    In memory a page holds one head after the other: a head reads its keys as one stretch, which
    is twice as fast on a CPU as picking them out between those of the other heads.
    """
    heads, dim = like.shape[-2:]

    def of(slots: int, *rest: int) -> Tensor:
        shape = (pool, heads, slots, *rest)
        return torch.empty(shape, dtype=like.dtype, device=like.device).transpose(1, 2)

    keys, values = of(page_size, dim), of(page_size, dim)
    if bound_block_size is None:
        return PagedKV(keys, values)
    return PagedKV(keys, values, of(bound_offsets(page_size, bound_block_size)[-1], 2, dim))


class PagedLayer:
    """Keys and values of one layer, in pages that sequences own or share.

    A page is shared after sequences branch (beam search); whoever writes to a shared page first
    copies that page alone. Nothing else is ever copied, except when the pool grows.

    Args:
        page_size: keys in a page.
        bound_block_size: keys of the finest run that carries bounds; None keeps no bounds.
    """

    def __init__(self, page_size: int = 256, bound_block_size: int | None = 16) -> None:
        self.page_size, self.bound_block_size = page_size, bound_block_size
        self.lengths: list[int] = []
        self.kv: PagedKV | None = None
        self._table = torch.empty(0, 0, dtype=torch.int32)
        self._owners = torch.empty(0, dtype=torch.int32)

    @property
    def pages(self) -> PagedKV:
        """The pages; there are some once anything was appended."""
        if self.kv is None:
            raise RuntimeError("the layer holds no keys yet; append some first")
        return self.kv

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and bounds, used or reserved."""
        tensors = (self.kv.k_cache, self.kv.v_cache, self.kv.k_bounds) if self.kv else ()
        return sum(t.nbytes for t in tensors if t is not None)

    @ordinary_tensors
    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Appends keys and values `[batch, new, num_kv_heads, head_dim]`.

        `valid` `[batch, new]` bool leaves out the tokens where it is False (padding), so that the
        sequences of a batch may differ in length.
        """
        batch, new = k.shape[:2]
        self.lengths = self.lengths or [0] * batch
        counts = [new] * batch if valid is None else valid.sum(1).tolist()
        self._reserve(k, counts)
        slots = self._slots(counts, k.device)
        if valid is None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        else:
            k, v = k[valid], v[valid]
        size = self.bound_block_size or 16
        write_kv(k, v, self.pages, slots, bound_block_size=size, check=False)
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]

    def layout(self, query_lens: list[int]) -> BatchLayout:
        """The batch as operations take it, the last `query_lens` positions being the queries."""
        device = self.pages.k_cache.device
        used = max(-(-max(self.lengths) // self.page_size), 1)
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        table = self._table[:, :used].to(device)
        return BatchLayout(table, lengths.to(device), starts.to(device))

    def truncate(self, count: int) -> None:
        """Forgets the last `count` keys of every sequence."""
        self.lengths = [max(n - count, 0) for n in self.lengths]
        self._count_owners()

    @ordinary_tensors
    def reorder(self, order: Tensor) -> None:
        """Sequence i continues what was sequence `order[i]`; pages are shared, not copied."""
        order = order.cpu()
        self._table = self._table[order]
        self.lengths = [self.lengths[i] for i in order.tolist()]
        self._count_owners()

    def clear(self) -> None:
        """Forgets all sequences; the pages stay."""
        self.lengths = []
        self._table = torch.empty(0, 0, dtype=torch.int32)
        self._owners.zero_()

    def _used(self, seq: int) -> int:
        return -(-self.lengths[seq] // self.page_size)

    def _count_owners(self) -> None:
        self._owners.zero_()
        for seq in range(len(self.lengths)):
            pages = self._table[seq, : self._used(seq)].long()
            self._owners.index_add_(0, pages, torch.ones_like(pages, dtype=torch.int32))

    def _reserve(self, k: Tensor, counts: list[int]) -> None:
        """Gives every sequence pages of its own for what it is about to write."""
        writes = [self._pages_to_write(seq, count) for seq, count in enumerate(counts)]
        missing = sum(end - first for first, end in writes)
        free = (self._owners == 0).nonzero()[:missing, 0]
        if len(free) < missing or self.kv is None:
            self._grow(k, missing - len(free))
            free = (self._owners == 0).nonzero()[:missing, 0]
        self._widen(len(counts), max(end for _, end in writes))
        taken = 0
        for seq, (first, end) in enumerate(writes):
            own = free[taken : taken + end - first]
            taken += end - first
            if first < self._used(seq) and end > first:
                self._copy_page(int(self._table[seq, first]), int(own[0]))
            self._table[seq, first:end] = own.int()
            self._owners[own] = 1

    def _pages_to_write(self, seq: int, count: int) -> tuple[int, int]:
        """Pages [first, end) of a sequence that have to be new: it lacks or shares them."""
        used, end = self._used(seq), -(-(self.lengths[seq] + count) // self.page_size)
        partial = count and self.lengths[seq] % self.page_size
        shared = partial and int(self._owners[self._table[seq, used - 1]]) > 1
        return (used - 1 if shared else used), max(end, used)

    def _copy_page(self, source: int, target: int) -> None:
        self._owners[source] -= 1
        for pages in (self.pages.k_cache, self.pages.v_cache, self.pages.k_bounds):
            if pages is not None:
                pages[target] = pages[source]

    def _widen(self, batch: int, columns: int) -> None:
        if self._table.shape[0] == batch and self._table.shape[1] >= columns:
            return
        table = torch.zeros(batch, max(columns, 2 * self._table.shape[1]), dtype=torch.int32)
        if self._table.numel():
            table[:, : self._table.shape[1]] = self._table
        self._table = table

    def _grow(self, k: Tensor, missing: int) -> None:
        held = self._owners.shape[0]
        pool = held + max(missing, int(held * GROWTH), 4096 // self.page_size)
        new_kv = empty_pages(pool, self.page_size, self.bound_block_size, k)
        if self.kv is not None:
            held_pages = (self.kv.k_cache, self.kv.v_cache, self.kv.k_bounds)
            new_pages = (new_kv.k_cache, new_kv.v_cache, new_kv.k_bounds)
            for new, old in zip(new_pages, held_pages, strict=True):
                if new is not None and old is not None:
                    new[:held] = old
        self.kv = new_kv
        self._owners = torch.cat([self._owners, torch.zeros(pool - held, dtype=torch.int32)])

    def _slots(self, counts: list[int], device: torch.device) -> Tensor:
        """`[sum of counts]` int64: where the next `counts` keys of every sequence go."""
        slots: list[Tensor] = []
        for seq, count in enumerate(counts):
            positions = torch.arange(self.lengths[seq], self.lengths[seq] + count)
            pages = self._table[seq, positions // self.page_size].long()
            slots.append(pages * self.page_size + positions % self.page_size)
        return torch.cat(slots).to(device)
