"""Which type weights get where nobody names one."""

from __future__ import annotations

import pytest
import torch

from hipserve.host import HostMemory
from hipserve.models import load, loading
from hipserve.platform import cpu_multiplies


@pytest.mark.parametrize(
    ("multiplies", "available", "asked", "got"),
    [
        (False, 1 << 34, "auto", torch.float32),
        (False, 1 << 20, "auto", torch.bfloat16),
        (False, 1 << 34, "bfloat16", torch.bfloat16),
        (True, 1 << 34, "auto", torch.bfloat16),
    ],
)
def test_weights_are_float32_where_the_cpu_multiplies_nothing_shorter(
    monkeypatch: pytest.MonkeyPatch,
    multiplies: bool,
    available: int,
    asked: str,
    got: torch.dtype,
) -> None:
    memory = HostMemory(available, available)
    monkeypatch.setattr(loading, "cpu_multiplies", lambda _: multiplies)
    monkeypatch.setattr(HostMemory, "read", lambda: memory)
    model = load(dtype=asked, device="cpu").model
    assert model.dtype == model.config.dtype == got
    assert {weight.dtype for weight in model.parameters()} == {got}


def test_every_cpu_multiplies_float32() -> None:
    assert cpu_multiplies(torch.float32)
