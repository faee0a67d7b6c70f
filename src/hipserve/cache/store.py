"""Where the pages of a layer are: what a `PagedLayer` asks of memory, and pages on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from hipserve.config import HiPConfig, IndexForm
from hipserve.ops import write_kv
from hipserve.ops.write_kv.layout import IndexLayout, Rows
from hipserve.plan import BatchLayout, PruningRule
from hipserve.types import BlockSelection, KeyIndex, KeyPool

GROWTH = 0.25
"""Minimum share by which full memory grows: copies stay rare."""

P = ParamSpec("P")
R = TypeVar("R")


def ordinary_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """Pages outlive the call that makes them: under `torch.inference_mode` they would be frozen."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **options)

    return wrapped


class Write(NamedTuple):
    """What one sequence appends: keys at the positions [begin, end), in the pages `table`."""

    table: list[int]
    begin: int
    end: int


class PageStore(Protocol):
    """The memory of one layer's pages."""

    @property
    def pool(self) -> KeyPool:
        """All pages, wherever they are."""
        ...

    index: KeyIndex
    """What a search reads of them."""

    @property
    def host_nbytes(self) -> int:
        """Bytes in host memory or in a file, apart from the device of the keys."""
        ...

    @property
    def device_nbytes(self) -> int:
        """Bytes on the device of the keys."""
        ...

    def grow(self, held: int, wanted: int, k: Tensor) -> int:
        """Makes room for `wanted` pages, of which `held` are kept; returns how many there are.

        k: `[..., num_kv_heads, head_dim]`, keys as the pages hold them.

        Raises:
            FitError: there is no room.
        """
        ...

    def write(self, k: Tensor, v: Tensor, slots: Tensor, writes: Sequence[Write]) -> None:
        """Writes k and v `[num_tokens, num_kv_heads, head_dim]` and their index to slots
        `[num_tokens]` int64, which are what `writes` describes."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Makes a page equal another."""
        ...

    def fetch(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,
        config: HiPConfig,
        rule: PruningRule | None,
        /,
    ) -> KeyPool:
        """As `LayerKeys.fetch` in `hipserve.attention.layer`, for what was written last."""
        ...

    def count_loads(self) -> tuple[int, int]:
        """Tiles that all steps needed, and that they had to load; zeros where nobody counts."""
        ...


class HostedStore(PageStore, Protocol):
    """Pages of which only the index is where the model is.

    Attributes:
        sequences: what `fetch` reads: those that were written last, unless set.
    """

    sequences: Sequence[Write]

    def hold(self, count: int) -> None:
        """Makes room for `count` pages, and no more later; whoever keeps their index sets `index`.

        Raises:
            FitError: there is no room.
        """
        ...


def grown(held: int, wanted: int, page_size: int) -> int:
    """Pages that memory with `held` pages gets where it needs `wanted`: copies stay rare."""
    return max(wanted, held + max(int(held * GROWTH), 4096 // page_size))


def empty_pages(
    count: int, page_size: int, form: IndexForm, like: Tensor
) -> tuple[KeyPool, KeyIndex]:
    """Pages for keys `[..., num_kv_heads, head_dim]` with the dtype and device of `like`.

    A sequence that fills them all has its long runs (`hipserve.ops.join_runs`).

    In memory a page holds one head after the other: a head reads its keys as one stretch, which
    is twice as fast on a CPU as picking them out between those of the other heads.
    """
    heads, dim = like.shape[-2:]
    rows = Rows(page_size, (dim,), like.dtype)
    pool = KeyPool(_allocate(count, heads, rows, like), _allocate(count, heads, rows, like))
    return pool, empty_index(count, page_size, form, pool.k_cache)


def empty_index(
    count: int, page_size: int, form: IndexForm, keys: Tensor, device: torch.device | None = None
) -> KeyIndex:
    """An index of `count` of the pages of `keys` `[num_pages, page_size, num_kv_heads, head_dim]`,
    on their device or another, as deep as a sequence in all of them needs it."""
    heads, dim = keys.shape[-2:]
    layout = IndexLayout.of_pages(page_size, dim, keys.dtype, form, count * page_size)
    there = keys if device is None else torch.empty(0, device=device)
    return layout.index(keys, lambda rows: _allocate(count, heads, rows, there))


def larger_index(index: KeyIndex, held: int, count: int, form: IndexForm, keys: Tensor) -> KeyIndex:
    """An index of `count` of the pages of `keys`, as `empty_index` makes it, on the device of
    `index`, whose first `held` pages it has.

    keys: `[num_pages, page_size, num_kv_heads, head_dim]`.
    """
    larger = empty_index(count, keys.shape[1], form, keys, index.codes.device)
    keep_pages(index.tensors(), larger.tensors(), held)
    return larger


def keep_pages(old: list[Tensor], new: list[Tensor], held: int) -> None:
    """Copies the first `held` pages of each tensor `[num_pages, ...]`; an index may have got more
    levels, whose runs come last in a page."""
    for source, target in zip(old, new, strict=True):
        target[:held, : source.shape[1]] = source[:held]


def _allocate(count: int, heads: int, rows: Rows, like: Tensor) -> Tensor:
    shape = (count, heads, rows.count, *rows.shape)
    return torch.empty(shape, dtype=rows.dtype, device=like.device).transpose(1, 2)


class ResidentPages:
    """Keys, values and their index on one device: a `PageStore`.

    Args:
        page_size, form: as in `PagedLayer`.
        k: `[..., num_kv_heads, head_dim]`, keys as the pages will hold them.
    """

    def __init__(self, page_size: int, form: IndexForm, k: Tensor) -> None:
        self.page_size, self.form = page_size, form
        self.pool, self.index = empty_pages(0, page_size, form, k)

    def _tensors(self) -> list[Tensor]:
        return [self.pool.k_cache, self.pool.v_cache, *self.index.tensors()]

    @property
    def host_nbytes(self) -> int:
        return 0

    @property
    def device_nbytes(self) -> int:
        return sum(x.nbytes for x in self._tensors())

    @ordinary_tensors
    def grow(self, held: int, wanted: int, k: Tensor) -> int:
        """As `PageStore.grow`: moves the pages to larger memory; k
        `[..., num_kv_heads, head_dim]`."""
        count, before = grown(held, wanted, self.page_size), self._tensors()
        self.pool, self.index = empty_pages(count, self.page_size, self.form, k)
        keep_pages(before, self._tensors(), held)
        return count

    def write(self, k: Tensor, v: Tensor, slots: Tensor, writes: Sequence[Write]) -> None:  # noqa: ARG002
        """As `PageStore.write`; k, v `[num_tokens, num_kv_heads, head_dim]`, slots
        `[num_tokens]`."""
        write_kv(k, v, self.pool, self.index, slots, check=False)

    @ordinary_tensors
    def copy(self, source: int, target: int) -> None:
        for pages in self._tensors():
            pages[target] = pages[source]

    def fetch(self, *_: object) -> KeyPool:
        """Everything is where attention reads it."""
        return self.pool

    def count_loads(self) -> tuple[int, int]:
        return 0, 0
