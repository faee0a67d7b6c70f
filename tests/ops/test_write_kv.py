"""Pages hold what was written, and summaries describe exactly the keys that are there."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from backends import every_backend, using
from hipserve.ops import build_index, write_kv
from hipserve.plan import bound_levels, bound_offsets
from hipserve.testing.cases import Pages, Shape, empty_pages
from hipserve.types import KeyPool

SEEDS = st.integers(0, 2**31 - 1)


def assert_summarized(kv: Pages, page: int, keys: torch.Tensor, size: int) -> None:
    """`keys` `[n, heads, head_dim]` is what the page holds from its start."""
    assert kv.index.summaries is not None
    sizes = (kv.pool.page_size, size, kv.index.summaries.shape[1])
    offsets = bound_offsets(*sizes)
    for level, length in enumerate(bound_levels(*sizes)):
        for run, inside in enumerate(keys.split(length)):
            mean, deviation = kv.index.summaries[page, offsets[level] + run].unbind(1)
            exact = inside.double()
            assert torch.equal(mean, exact.mean(0).to(mean.dtype))
            spread = exact.std(0, unbiased=False).to(mean.dtype)
            torch.testing.assert_close(deviation, spread, atol=1e-7, rtol=1e-6)


@every_backend
@given(seed=SEEDS)
def test_appending_truncating_and_rewriting(backend: str, seed: int) -> None:
    rng = random.Random(seed)
    shape = Shape(
        (1,),
        (1,),
        head_dim=rng.choice([64, 80, 512]),
        page_size=rng.choice([16, 64, 256]),
        dtype=rng.choice([torch.float32, torch.bfloat16, torch.float16]),
    )
    kv, length = empty_pages(3, shape, 16), 0
    truth = torch.full((2 * shape.page_size, 2, shape.head_dim), torch.nan, dtype=shape.dtype)
    table = torch.tensor(rng.sample(range(3), 2))
    with using(backend) as name:
        for _ in range(12):
            if rng.random() < 0.3:
                length = rng.randint(0, length)
            count = min(rng.choice([1, 1, 5, 40, 100]), len(truth) - length)
            k = torch.randn(count, 2, shape.head_dim).to(shape.dtype)
            positions = torch.arange(length, length + count)
            slots = (
                table[positions // shape.page_size] * shape.page_size + positions % shape.page_size
            )
            order = torch.randperm(count) if rng.random() < 0.3 else torch.arange(count)
            write_kv(k[order], k[order] * 2, kv.pool, kv.index, slots[order], backend=name)
            truth[length : length + count] = k
            length += count
            for i in range(2):
                held = truth[i * shape.page_size : min(length, (i + 1) * shape.page_size)]
                if len(held):
                    page = int(table[i])
                    assert torch.equal(kv.pool.k_cache[page, : len(held)], held)
                    assert torch.equal(kv.pool.v_cache[page, : len(held)], held * 2)
                    assert_summarized(kv, page, held, 16)


@every_backend
def test_skipped_tokens_leave_no_trace(backend: str) -> None:
    kv = empty_pages(2, Shape((1,), (1,)), 16)
    k = torch.randn(3, 2, 64)
    with using(backend) as name:
        write_kv(k, k, kv.pool, kv.index, torch.tensor([-1, 64, -1]), backend=name)
    assert bool(kv.pool.k_cache[0].isnan().all())
    assert torch.equal(kv.pool.k_cache[1, 0], k[1])
    assert bool(kv.pool.k_cache[1, 1:].isnan().all())
    assert_summarized(kv, 1, k[1:2], 16)


@every_backend
def test_slots_that_jump_between_pages(backend: str) -> None:
    kv = empty_pages(2, Shape((1,), (1,)), 16)
    k = torch.randn(24, 2, 64)
    with using(backend) as name:
        write_kv(k[:19], k[:19], kv.pool, kv.index, torch.arange(19), backend=name)
        write_kv(k[19:22], k[19:22], kv.pool, kv.index, torch.tensor([19, 64, 3]), backend=name)
    held = torch.cat([k[:3], k[21:22], k[4:20]])
    assert_summarized(kv, 0, held, 16)
    assert_summarized(kv, 1, k[20:21], 16)


@every_backend
def test_strided_keys(backend: str) -> None:
    kv = empty_pages(1, Shape((1,), (1,)), 16)
    fused = torch.randn(20, 8, 64)
    with using(backend) as name:
        write_kv(fused[:, 4:6], fused[:, 6:8], kv.pool, kv.index, torch.arange(20), backend=name)
    assert torch.equal(kv.pool.k_cache[0, :20], fused[:, 4:6])
    assert torch.equal(kv.pool.v_cache[0, :20], fused[:, 6:8])


@every_backend
@given(seed=SEEDS)
def test_bounds_of_whole_sequences(backend: str, seed: int) -> None:
    rng = random.Random(seed)
    k = torch.randn(2, rng.choice([1, 15, 16, 17, 255, 256, 300, 1000]), 2, 64)
    with using(backend) as name:
        kv = Pages(KeyPool(k, k), build_index(k, backend=name))
    for page in range(2):
        assert_summarized(kv, page, k[page], 16)
