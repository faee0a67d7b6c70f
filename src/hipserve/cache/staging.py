"""Some pages of offloaded layers on the device."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hipserve.cache.store import ordinary_tensors
from hipserve.types import KeyPool


def pool_of(pages: Tensor, places: Tensor | None = None) -> KeyPool:
    """Pages `[num_pages, num_kv_heads, 2, page_size, head_dim]` as operations take them; places
    as in `KeyPool`, `[n]`."""
    return KeyPool(pages[:, :, 0].transpose(1, 2), pages[:, :, 1].transpose(1, 2), places)


def runs_of(
    pairs: Sequence[tuple[int, int]], cuts: Sequence[int] = ()
) -> Iterator[tuple[int, int, int]]:
    """Stretches in which both numbers of the pairs count up: where each begins, and its length.

    cuts: ascending; none of the first numbers is in a stretch with one before a cut.
    """

    def stretch(numbered: tuple[int, tuple[int, int]]) -> tuple[int, int, int]:
        i, (first, second) = numbered
        return first - i, second - i, bisect.bisect(cuts, first)

    for _, group in itertools.groupby(enumerate(pairs), stretch):
        run = [pair for _, pair in group]
        yield *run[0], len(run)


class HostPages(NamedTuple):
    """Pages in memory of the host.

    Attributes:
        pages: `[num_pages, num_kv_heads, 2, page_size, head_dim]`.
        cuts: ascending page numbers; a single copy must not go past one.
    """

    pages: Tensor
    cuts: Sequence[int] = ()


class StagedPages:
    """Copies of some pages in memory of the device, with room for as many as were asked for.

    Attributes:
        pages: `[num_places, num_kv_heads, 2, page_size, head_dim]`.
        places: `[num_pages]` int32: where the copy of each page is.
        held: the same on the host, of the pages that have one.
    """

    def __init__(self, page_size: int, k: Tensor) -> None:
        heads, dim = k.shape[-2:]
        self.pages = torch.empty((0, heads, 2, page_size, dim), dtype=k.dtype, device=k.device)
        self.places = torch.zeros(0, dtype=torch.int32, device=k.device)
        self.held: dict[int, int] = {}
        self.pool = pool_of(self.pages, self.places)
        self._owner: object = None

    def take(self, owner: object) -> None:
        """The copies are of the owner's pages from here on."""
        if self._owner is not owner:
            self._owner, self.held = owner, {}

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.places.nbytes

    def hold(self, wanted: Sequence[int], host: HostPages, written: Collection[int]) -> None:
        """Makes the pages `wanted` present; those that are not, and were `written`, are copied."""
        enough = host.pages.shape[0] <= self.places.shape[0]
        if not enough or any(p not in self.held for p in wanted):
            self._hold(wanted, host, written)

    @ordinary_tensors
    def _hold(self, wanted: Sequence[int], host: HostPages, written: Collection[int]) -> None:
        self._make_room(len(wanted), host.pages.shape[0])
        keep = {p: place for p in wanted if (place := self.held.get(p)) is not None}
        free = iter(sorted({*range(self.pages.shape[0])} - {*keep.values()}))
        new = {p: next(free) for p in wanted if p not in keep}
        taken = {*new.values()}
        self.held = {p: at for p, at in self.held.items() if at not in taken} | new
        copied = [(p, at) for p, at in new.items() if p in written]
        for page, place, count in runs_of(copied, host.cuts):
            source = host.pages[page : page + count]
            self.pages[place : place + count].copy_(source, non_blocking=True)
        ints = torch.tensor([[*new], [*new.values()]], device=self.places.device)
        self.places[ints[0]] = ints[1].int()

    def _make_room(self, count: int, num_pages: int) -> None:
        """For `count` pages at a time, of so many; larger memory forgets what it held."""
        if count > self.pages.shape[0]:
            self.pages = self.pages.new_empty((count, *self.pages.shape[1:]))
            self.held = {}
        if num_pages > self.places.shape[0]:
            self.places = self.places.new_zeros(num_pages)
            self.held = {}
        self.pool = pool_of(self.pages, self.places)

    def forget(self, pages: Collection[int]) -> None:
        """Their copies are out of date."""
        for page in pages:
            self.held.pop(page, None)

    def store(self, changed: Sequence[int], host: HostPages) -> None:
        """Copies pages back to the host."""
        for page, place, count in runs_of([(p, self.held[p]) for p in changed], host.cuts):
            source = self.pages[place : place + count]
            host.pages[page : page + count].copy_(source, non_blocking=True)
