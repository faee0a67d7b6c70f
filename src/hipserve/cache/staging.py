"""Some pages of offloaded layers on the device."""

from __future__ import annotations

import bisect
import itertools
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hipserve.cache.store import ordinary_tensors
from hipserve.cache.transfers import CopyStream, sent
from hipserve.offload import STAGED_LAYERS
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
        self._moved: dict[int, int] = {}  # those that `places` does not know yet
        self.pool = pool_of(self.pages, self.places)

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.places.nbytes

    def holds(self, wanted: Collection[int], host: HostPages) -> bool:
        """The pages `wanted` are present."""
        enough = host.pages.shape[0] <= self.places.shape[0]
        return enough and all(p in self.held for p in wanted)

    @ordinary_tensors
    def hold(self, wanted: Collection[int], host: HostPages, written: Collection[int]) -> None:
        """Makes the pages `wanted` present; those that are not, and were `written`, are copied."""
        self.make_room(len(wanted), host.pages.shape[0])
        self.copy(wanted, host, written)
        if self._moved:
            ints = sent([[*self._moved], [*self._moved.values()]], self.places.device)
            self.places[ints[0]] = ints[1].int()
            self._moved = {}

    @ordinary_tensors
    def copy(self, wanted: Collection[int], host: HostPages, written: Collection[int]) -> None:
        """What `hold` copies, and no kernel: kernels would wait for those that compute. For no more
        pages than there was made room for."""
        if all(p in self.held for p in wanted):
            return
        keep = {p: place for p in wanted if (place := self.held.get(p)) is not None}
        free = iter(sorted({*range(self.pages.shape[0])} - {*keep.values()}))
        new = {p: next(free) for p in wanted if p not in keep}
        taken = {*new.values()}
        self.held = {p: at for p, at in self.held.items() if at not in taken} | new
        self._moved |= new
        copied = [(p, at) for p, at in new.items() if p in written]
        for page, place, count in runs_of(copied, host.cuts):
            source = host.pages[page : page + count]
            self.pages[place : place + count].copy_(source, non_blocking=True)

    @ordinary_tensors
    def make_room(self, count: int, num_pages: int) -> None:
        """For `count` pages at a time, of so many; larger memory forgets what it held."""
        if count <= self.pages.shape[0] and num_pages <= self.places.shape[0]:
            return
        if count > self.pages.shape[0]:
            self.pages = self.pages.new_empty((count, *self.pages.shape[1:]))
            self.held = {}
        more = max(num_pages - self.places.shape[0], 0)
        self.places = torch.cat([self.places, self.places.new_zeros(more)])
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


class PagesOwner(Protocol):
    """A layer whose pages are staged."""

    @property
    def host(self) -> HostPages:
        """All its pages, in memory of the host."""
        ...


class Buffer:
    """Staged pages, and the layer whose pages they are copies of."""

    def __init__(self, page_size: int, k: Tensor) -> None:
        self.pages = StagedPages(page_size, k)
        self.owner: weakref.ref[PagesOwner] | None = None

    def belongs_to(self, layer: PagesOwner) -> bool:
        return self.owner is not None and self.owner() is layer

    def take(self, layer: PagesOwner) -> None:
        if not self.belongs_to(layer):
            self.owner = weakref.ref(layer)
            self.pages.held.clear()


class Staging:
    """Two buffers that layers use in turn: while one computes, the pages of the next one travel,
    and those that the one before has written.

    Layers are referred to weakly: their memory is free as soon as their cache is gone.

    Args:
        page_size: keys in a page.
        k: `[..., num_kv_heads, head_dim]`, keys as the pages hold them.
        room: pages that each buffer holds from the beginning, and for good; 0 takes memory as it
            is needed, and gives it up.
    """

    def __init__(self, page_size: int, k: Tensor, room: int = 0) -> None:
        self._page_size, self._like = page_size, k.new_empty((0, *k.shape[-2:]))
        self._room = room
        self._copies = CopyStream(k.device)
        self._layers: list[weakref.ref[PagesOwner]] = []
        self._clear()

    def _clear(self) -> None:
        self._buffers = [Buffer(self._page_size, self._like) for _ in range(STAGED_LAYERS)]
        for buffer in self._buffers:
            buffer.pages.make_room(self._room, 0)
        self._held = False

    @property
    def nbytes(self) -> int:
        return sum(buffer.pages.nbytes for buffer in self._buffers)

    def join(self, layer: PagesOwner) -> None:
        """Layers join in the order in which they compute."""
        self._layers.append(weakref.ref(layer))

    def stage(
        self, layer: PagesOwner, wanted: Collection[int], written: Collection[int]
    ) -> StagedPages:
        """The pages `wanted` of the layer; of those that were not `written`, only the room.

        The copies of the layer before are given up.
        """
        self._held = True
        last = self._buffers[-1]
        if last.belongs_to(layer) and last.pages.holds(wanted, layer.host):
            return last.pages  # what travels meanwhile need not arrive
        self._copies.wait()
        current, other = sorted(self._buffers, key=lambda b: not b.belongs_to(layer))
        current.take(layer)
        current.pages.hold(wanted, layer.host, written)
        self._buffers = [other, current]  # the next layer's, if it has none yet, is the other one
        following = self._following(layer)
        if following is not None and written and not other.belongs_to(following):
            self._prefetch(other, following, wanted, written)
        return current.pages

    def _following(self, layer: PagesOwner) -> PagesOwner | None:
        joined = [known() for known in self._layers]
        at = joined.index(layer) + 1
        return joined[at] if at < len(joined) else None

    def _prefetch(
        self, buffer: Buffer, layer: PagesOwner, wanted: Collection[int], written: Collection[int]
    ) -> None:
        """What a layer will want that has as many sequences in the same pages; if it wants
        something else, that is copied when it does."""
        host = layer.host
        there = [p for p in wanted if p in written and p < host.pages.shape[0]]
        buffer.take(layer)
        buffer.pages.make_room(len(wanted), host.pages.shape[0])
        with self._copies.behind(buffer.pages.pages):
            buffer.pages.copy(there, host, written)

    def store(self, pages: StagedPages, changed: Sequence[int], host: HostPages) -> None:
        """Copies pages back to the host, behind what is computed meanwhile."""
        with self._copies.behind(pages.pages):
            pages.store(changed, host)

    def forget(self, layer: PagesOwner, pages: Collection[int]) -> None:
        """Copies of these pages of the layer are out of date."""
        for buffer in self._buffers:
            if buffer.belongs_to(layer):
                buffer.pages.forget(pages)

    def drop(self, layer: PagesOwner) -> None:
        """Copies of all pages of the layer are out of date."""
        for buffer in self._buffers:
            if buffer.belongs_to(layer):
                buffer.pages.held.clear()

    def wait(self) -> None:
        """Pages on the host have what was stored, for what is launched from here on."""
        self._copies.wait()

    def release(self) -> None:
        """Gives up all copies, and their memory unless it is kept for good."""
        if self._held and not self._room:
            self._copies.wait()
            self._clear()
