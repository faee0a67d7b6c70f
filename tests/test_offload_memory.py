"""Memory and files that offloaded keys take: sizes, limits, and errors that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hipserve import ConfigError, FitError, HiPConfig, Offload
from hipserve.cache import OffloadedLayers
from hipserve.cache.host import MappedFile, PinnedMemory
from hipserve.cache.staging import runs_of
from hipserve.host import HostMemory
from hipserve.offload import format_bytes, parse_bytes


def test_more_memory_than_there_is_is_refused_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for container, said in ((None, "1 GiB are available"), (2**32, "available, 4 GiB at most")):
        memory = HostMemory(total=2**34, available=2**30, container=container)
        monkeypatch.setattr(HostMemory, "read", lambda memory=memory: memory)
        with pytest.raises(FitError, match=f"host_memory asks for 2 GiB, and .*{said}"):
            OffloadedLayers(Offload("2GiB"), 1, HiPConfig(code_bits=4))


def test_copies_stay_in_what_was_pinned_together() -> None:
    pairs = [(4, 0), (5, 1), (6, 2), (7, 3), (9, 4), (10, 5), (3, 6)]
    assert list(runs_of(pairs)) == [(4, 0, 4), (9, 4, 2), (3, 6, 1)]
    assert list(runs_of(pairs, [0, 6, 10])) == [
        *[(4, 0, 2), (6, 2, 2), (9, 4, 1)],
        *[(10, 5, 1), (3, 6, 1)],
    ]
    memory = PinnedMemory(2**20, pinned=False)
    for nbytes in (5000, 7000, 7000, 2**20):
        memory.reserve(nbytes)
    start = memory.tensor().data_ptr()
    assert memory.pieces == [start, start + 5000, start + 7000]


def test_a_driver_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def cudaHostRegister(self, *_: int) -> int:  # noqa: N802
            return 801

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    with pytest.raises(FitError, match=r"refuses to pin 2 MiB \(error 801\)"):
        PinnedMemory(2**22).reserve(2**21)


def test_files_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for path in (taken, tmp_path / "none" / "kv"):
        with pytest.raises(FitError, match=f"{path} cannot be made"):
            MappedFile(path, 2**20)
    assert taken.read_text() == "mine"
    with pytest.raises(FitError, match=r"host_memory asks for 4096 GiB .*, and .* are free"):
        MappedFile(tmp_path / "kv", 2**42)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64GiB", 2**36), ("64G", 64 * 10**9), ("1.5 MiB", 3 * 2**19), (4096, 4096), ("7kb", 7000)],
)
def test_sizes_are_read_as_people_write_them(text: str | int, size: int) -> None:
    assert Offload(text).host_bytes == parse_bytes("host_memory", text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1", 0, -5, True, None, "4 GiBs"])
def test_other_sizes_are_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="host_memory: expected a size such as"):
        Offload(text)


def test_sizes_are_shown_as_people_read_them() -> None:
    assert [format_bytes(n) for n in (7, 2048, 3 * 2**19, 2**36)] == [
        *("7 bytes", "2 KiB"),
        *("1.5 MiB", "64 GiB"),
    ]
    with pytest.raises(ConfigError, match="file: expected a path"):
        Offload(1, file=3)  # type: ignore[arg-type]
