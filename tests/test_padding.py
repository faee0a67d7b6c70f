"""Windows that count columns, padding included, against a mask in float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hipserve.attention.padding import attend_columns, window_starts


def masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float) -> list[Tensor]:
    """Output and log-sum-exp in float64; visible: `[batch, query_len, kv_len]`."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    out = (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)
    return [out, scores.logsumexp(-1).transpose(1, 2)]


@pytest.mark.parametrize("seed", range(6))
def test_windows_of_columns_are_exact(seed: int) -> None:
    """Padding in front, between and behind, in one sequence everywhere; windows of any width."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv_len = rng.randint(1, 150)
    query_len, window = rng.randint(1, kv_len), rng.choice([1, 7, 40, 1000])
    q, softcap = torch.randn(3, query_len, 6, 32), rng.choice([0.0, 5.0])
    k, v = torch.randn(2, 3, kv_len, 2, 32)
    valid = torch.rand(3, kv_len) < torch.tensor([0.6, 0.95, 0.0])[:, None]
    columns = torch.arange(kv_len)
    rows = columns[kv_len - query_len :, None]
    visible = (columns <= rows) & (columns > rows - window) & valid[:, None]
    counted = valid[:, kv_len - query_len :]
    visible &= counted[..., None]
    got = attend_columns(q, k, v, valid, window, sm_scale=None, softcap=softcap)
    expected = masked(q, k, v, visible, softcap)
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=2e-5, rtol=2e-5)
    assert not got[0][~counted].any()


def test_window_starts_count_the_tokens_in_front() -> None:
    valid = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]]).bool()
    assert window_starts(valid, 2).tolist() == [[0, 0, 1, 2, 2, 2], [0, 0, 0, 1, 2, 3]]
    assert not window_starts(valid, 10).any()
