"""Offloaded layers with the Triton kernels: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings

from hipserve.cache.tiles import row_tiles
from hipserve.platform import interpreting
from test_offload import CONFIG, TiledEqualsResident

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not (GPU or interpreting()), reason="no GPU and no interpreter")


class Machine(TiledEqualsResident):
    """The same laws as in tests/test_offload.py."""

    backend, device = "triton", "cuda" if GPU else "cpu"
    slots = 4 * row_tiles(CONFIG.replace(refresh_interval=4))


def test_a_history_of_a_batch_is_the_same_with_tiles() -> None:
    machine: Any = Machine()
    machine.start(batch=1, interval=2)
    machine.append(140)
    machine.append(1)
    machine.reorder([0, 0])
    machine.append(1)
    machine.append(1)
    machine.truncate(20)
    machine.forget(0.3)
    machine.append(17)
    machine.clear(batch=1)
    machine.append(3)


@pytest.mark.skipif(not GPU, reason="no GPU: the interpreter takes minutes")
def test_any_history_of_a_batch_is_the_same_with_tiles() -> None:
    machine: Any = Machine.TestCase
    machine.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
    machine("runTest").runTest()
