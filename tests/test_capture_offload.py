"""Captured decode steps over keys in host memory: those of resident keys, without the host."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.test_capture import IDS, at_once, pair, steps
from torch import Tensor

from hipserve import HiPCache, Offload, platform
from hipserve.cache import OffloadedLayers, offload
from hipserve.cache.host import PinnedMemory
from hipserve.cache.tiles import most_row_tiles
from hipserve.integrations.transformers.settings import config_of
from hipserve.offload import slot_bytes
from hipserve.plan import pruning_rule

__all__ = ["at_once"]

PAGE = 32
TEXT = torch.randint(1, 96, (1, 4300), generator=torch.Generator().manual_seed(7))
CODED: dict[str, Any] = {"code_bits": 4, "rerank": 8, "decode_dense_below": 0}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles in the memory of a CPU, poisoned, and the reference in place of kernels."""
    off = platform.NativeLibrary(None, "only the reference has tiles here")
    monkeypatch.setattr(platform, "native_library", lambda: off)
    make = OffloadedLayers._tiled

    def poisoned(*asked: Any) -> Any:
        made: Any = make(*asked)
        made._host.fill_(torch.nan)
        made.arena.tiles.fill_(torch.nan)
        return made

    monkeypatch.setattr(OffloadedLayers, "make_store", poisoned)
    unpinned = functools.partial(PinnedMemory, pinned=False)
    monkeypatch.setattr(offload, "PinnedMemory", unpinned)
    platform.resolve_backend.cache_clear()
    yield
    platform.resolve_backend.cache_clear()


def tiles_of_a_row(model: Any, keys: int) -> int:
    """Maximum that a row of sequences of so many keys reads of a head."""
    config = config_of(model.config)
    return most_row_tiles(config, pruning_rule(config, "cpu"), keys)


def offloaded(model: Any, tiles: float) -> HiPCache:
    """A cache whose layers have room for so many tiles."""
    config = model.config
    slot = slot_bytes(config.num_key_value_heads, config.head_dim, 4)
    device = int(config.num_hidden_layers * tiles * slot)
    asked = Offload(host_memory="64MiB", device_memory=device)
    return HiPCache(config, page_size=PAGE, offload=asked)


def prompt(model: Any, cache: HiPCache, ids: Tensor) -> None:
    with torch.no_grad():
        model(ids, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize(
    "hip", [{}, {"refresh_interval": 4}, {"share_group": False}, {"dense_layers": [0]}]
)
def test_replayed_steps_equal_those_of_resident_keys(hip: dict[str, Any]) -> None:
    """Through prompts, steps and crops, over an arena with no slot to spare. Without layer 0, which
    is resident then, both others keep the pages that were staged for them."""
    plain, model, recorder = pair({**CODED, **hip})
    lists = 2 if hip.get("share_group") is False else 1
    tiles = lists * tiles_of_a_row(model, 8 * 4096)
    caches = HiPCache(plain.config, page_size=PAGE), offloaded(model, tiles)
    recorder.cache = caches[1]
    for count, new, crop in ((150, 5, -75), (1, 30, -4), (33, 40, -30), (2, 3, 0)):
        out: list[Tensor] = []
        for m, cache in zip((plain, model), caches, strict=True):
            prompt(m, cache, TEXT[:, :count])
            out.append(steps(m, cache, IDS[1, :new]))
            if crop:
                cache.crop(crop)
        assert torch.equal(out[1], out[0])
    assert recorder.replayed > 60
    assert caches[1].count_keys() == pytest.approx(caches[0].count_keys())
    needed, loaded = caches[1].count_loads()
    assert 0 < loaded < needed


@torch.no_grad()
def test_too_small_an_arena_is_decoded_as_before() -> None:
    """It serves one row, and has no room for those of a batch wherever they are."""
    plain, model, recorder = pair(CODED)
    caches = HiPCache(plain.config, page_size=PAGE), offloaded(model, tiles_of_a_row(model, 400))
    recorder.cache = caches[1]
    out: list[Tensor] = []
    for m, cache in zip((plain, model), caches, strict=True):
        prompt(m, cache, IDS[:, :20])
        step = functools.partial(m, IDS[:, :1], past_key_values=cache)
        out.append(torch.cat([step().logits for _ in range(6)]))
    assert torch.equal(out[1], out[0])
    assert recorder.recorded == recorder.replayed == 0


@torch.no_grad()
def test_a_cache_that_grows_is_recorded_again() -> None:
    plain, model, recorder = pair(CODED)
    tiles = tiles_of_a_row(model, 8 * 4096)
    caches = HiPCache(plain.config, page_size=PAGE), offloaded(model, tiles)
    recorder.cache = caches[1]
    out: list[Tensor] = []
    for m, cache in zip((plain, model), caches, strict=True):
        found: list[Tensor] = []
        for count in (40, 4300, 30):
            prompt(m, cache, TEXT[:, :count])
            found.append(steps(m, cache, TEXT[0, :5]))
        out.append(torch.cat(found))
    assert torch.equal(out[1], out[0])
    assert recorder.recorded == 2
