"""Pages that are staged: those of the next layer travel early, and nothing out of date is read."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from hipserve import HiPConfig
from hipserve.cache.host import PinnedMemory
from hipserve.cache.staging import HostPages, StagedPages, Staging
from hipserve.cache.tiles import TiledPages

HEADS, DIM, PAGE = 2, 8, 16
K = torch.empty(1, HEADS, DIM)


class Layer:
    """A layer with six pages on the host."""

    def __init__(self) -> None:
        self.pages = torch.randn(6, HEADS, 2, PAGE, DIM)

    @property
    def host(self) -> HostPages:
        return HostPages(self.pages, [0, 3])


def copies(staged: StagedPages, pages: list[int]) -> Tensor:
    return staged.pages[staged.places[pages].long()]


@pytest.fixture
def layers() -> list[Layer]:
    torch.manual_seed(0)
    return [Layer() for _ in range(3)]


@pytest.fixture
def staging(layers: list[Layer]) -> Staging:
    made = Staging(PAGE, K)
    for layer in layers:
        made.join(layer)
    return made


def test_the_next_layers_pages_travel_while_one_computes(
    staging: Staging, layers: list[Layer]
) -> None:
    wanted, written = [4, 1, 2, 5], {1, 2, 4}
    for layer in layers:
        expected = layer.pages.clone()
        if layer is not layers[0]:
            layer.pages.fill_(torch.nan)  # too late: they are on their way
        staged = staging.stage(layer, wanted, written)
        assert torch.equal(copies(staged, [4, 1, 2]), expected[[4, 1, 2]])
        staged.pages[staged.places[5]] = 7
        staging.store(staged, [5], layer.host)
        assert (layer.pages[5] == 7).all()


def test_copies_that_are_out_of_date_are_made_again(staging: Staging, layers: list[Layer]) -> None:
    first, second, _ = layers
    staging.stage(first, [0, 1], {0, 1})
    second.pages[1] = 3
    staging.forget(first, [1])
    staging.forget(second, [1])
    staged = staging.stage(second, [0, 1], {0, 1})
    assert torch.equal(copies(staged, [0, 1]), second.pages[:2])


def test_a_layer_that_wants_more_gets_it(staging: Staging, layers: list[Layer]) -> None:
    first, second, _ = layers
    staging.stage(first, [0, 1], {0, 1})
    staged = staging.stage(second, [3, 0, 5, 1, 2], {0, 2, 3, 5})
    assert torch.equal(copies(staged, [3, 0, 5, 2]), second.pages[[3, 0, 5, 2]])
    assert torch.equal(copies(staging.stage(second, [1, 3], {1, 3}), [3]), second.pages[[3]])


def test_memory_is_given_up_and_taken_again(staging: Staging, layers: list[Layer]) -> None:
    staging.stage(layers[0], [0, 1], {0, 1})
    assert staging.nbytes > 2 * layers[0].pages[:2].nbytes
    staging.release()
    assert staging.nbytes == 0
    assert torch.equal(copies(staging.stage(layers[1], [1], {1}), [1]), layers[1].pages[[1]])


def test_layers_are_gone_with_their_last_name() -> None:
    """Pinned memory must not wait for Python to look for cycles."""
    config = HiPConfig(code_bits=4)
    k = torch.empty(1, HEADS, 32)
    staging = Staging(256, k)
    store = TiledPages(
        256,
        config.index_form,
        k,
        memory=PinnedMemory(2**22, pinned=False),
        device_bytes=2**22,
        staging=staging,
        floor=1,
    )
    store.grow(0, 2, k)
    store._stage(set())
    gone = weakref.ref(store)
    gc.disable()
    try:
        del store
        assert gone() is None
    finally:
        gc.enable()
