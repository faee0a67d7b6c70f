"""Memory of the host for pages: files that are mapped, memory that a GPU sees, and limits."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hipserve.errors import FitError
from hipserve.host import HostMemory
from hipserve.offload import format_bytes

OS_PAGE = mmap.PAGESIZE
GRANULARITY = 2 * 2**20
"""Bytes by which files and registrations grow at least."""
PIECE = 8 * 2**30
"""Bytes that are pinned at a time, at most: drivers refuse half a terabyte in one piece."""
MAPPED = 3
"""cudaHostRegisterPortable | cudaHostRegisterMapped."""


class MappedFile:
    """A file without a name that several stretches of memory are mapped to.

    Args:
        path: a file to make, whose name is free again at once, or a directory.
        nbytes: its largest size; space is reserved later, as it is needed.

    Raises:
        FitError: the disk has less space than that, or the path cannot be written.
    """

    def __init__(self, path: str | Path, nbytes: int) -> None:
        self.path, self.nbytes = Path(path), nbytes
        try:
            self._file = _nameless(self.path)
            os.ftruncate(self._file, nbytes)
        except OSError as error:
            hint = "choose a path that does not exist yet, in a directory that may be written"
            raise FitError(f"{path} cannot be made: {error.strerror}", hint) from error
        free = shutil.disk_usage(self._folder).free
        if nbytes > free:
            needs = f"{format_bytes(nbytes)} for keys and values, and {format_bytes(free)} are free"
            raise FitError(f"{self.path}: host_memory asks for {needs}")

    @property
    def _folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)  # mapped memory stays

    def stretch(self, offset: int, nbytes: int) -> FileMemory:
        """The bytes [offset, offset + nbytes) as memory; offset in steps of `GRANULARITY`."""
        return FileMemory(self, self._file, offset, nbytes)


def _nameless(path: Path) -> int:
    """A descriptor of a new file that no name leads to."""
    if path.is_dir():
        name = tempfile.mkstemp(prefix="hipserve-", dir=path)
        os.unlink(name[1])
        return name[0]
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    return file


class FileMemory:
    """A stretch of a `MappedFile` as memory: what was written or read stays in memory while there
    is room.

    Attributes:
        nbytes: of the stretch.
        reserved: bytes from its start that have space on the disk; nothing else may be used.
    """

    def __init__(self, file: MappedFile, descriptor: int, offset: int, nbytes: int) -> None:
        self.nbytes, self.reserved = nbytes, 0
        self._file, self._descriptor, self._offset = file, descriptor, offset
        self._map = mmap.mmap(descriptor, nbytes, offset=offset)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)  # a fault reads what it needs, and nothing around

    def tensor(self) -> Tensor:
        """All bytes `[nbytes]` uint8, reserved or not."""
        return torch.frombuffer(self._map, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> None:
        """Takes space on the disk for the first `nbytes` bytes.

        Raises:
            FitError: the disk is full; what was written stays readable.
        """
        end = min(-(-nbytes // GRANULARITY) * GRANULARITY, self.nbytes)
        if end <= self.reserved or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._descriptor, self._offset + self.reserved, end - self.reserved)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else error.strerror
            held = format_bytes(self.reserved)
            raise FitError(
                f"{self._file.path}: {reason} after {held} of this layer's keys and values",
                "lower host_memory, or free space and try again",
            ) from error
        self.reserved = end

    def will_need(self, ranges: list[tuple[int, int]]) -> None:
        """Asks for the bytes [begin, end) of all ranges at once instead of one fault after the
        other; returns before they are there."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        for begin, end in ranges:
            begin -= begin % OS_PAGE
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)


class PinnedMemory:
    """Memory of the host that a GPU reads and writes as well, without a copy.

    Attributes:
        nbytes: addresses; memory is taken as it is reserved.
        pieces: where the pieces begin that were pinned one by one, as addresses. A single copy must
            not cross from one to another.

    Args:
        nbytes: see above.
        pinned: False leaves out what makes a GPU see it.
    """

    def __init__(self, nbytes: int, *, pinned: bool = True) -> None:
        self.nbytes, self._reserved, self._pinned = nbytes, 0, pinned
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = mmap.mmap(-1, nbytes, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to touch and to pin
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self.pieces: list[int] = []
        if pinned:
            weakref.finalize(self, _unregister, self.pieces)

    def tensor(self) -> Tensor:
        """All bytes `[nbytes]` uint8, reserved or not."""
        return self._bytes

    def reserve(self, nbytes: int) -> None:
        """Takes memory for the first `nbytes` bytes, and makes a GPU see it.

        Raises:
            FitError: the driver refuses; what was reserved before stays.
        """
        while self._reserved < nbytes:
            end = min(nbytes, self._reserved + PIECE)
            piece = self._bytes[self._reserved : end]
            piece[::OS_PAGE] = 0  # pinning what was never touched takes twenty times as long
            if self._pinned:
                register(piece)
            self.pieces.append(piece.data_ptr())
            self._reserved = end


def _unregister(pieces: list[int]) -> None:
    if pieces:
        torch.cuda.synchronize()  # kernels and copies may still use them
    for pointer in pieces:
        _cudart().cudaHostUnregister(pointer)


def _cudart() -> Any:
    return torch.cuda.cudart()


def register(piece: Tensor) -> None:
    """Pins `piece` `[nbytes]` uint8, and makes every GPU see it.

    Raises:
        FitError: the driver refuses.
    """
    error = int(_cudart().cudaHostRegister(piece.data_ptr(), piece.nbytes, MAPPED))
    if error:
        reason = f"the CUDA driver refuses to pin {format_bytes(piece.nbytes)} (error {error})"
        hint = "lower host_memory; in WSL and confidential computing, leave offload out"
        raise FitError(f"host_memory: {reason}", hint)


def check_memory(nbytes: int) -> None:
    """Raises FitError where the machine, or its container, has less than that available."""
    memory = HostMemory.read()
    if memory is not None and nbytes > memory.available:
        asked, found = format_bytes(nbytes), format_bytes(memory.available)
        limit = "" if memory.container is None else f", {format_bytes(memory.container)} at most"
        raise FitError(f"host_memory asks for {asked}, and {found} are available{limit}")
