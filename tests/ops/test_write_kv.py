"""Pages hold what was written, and summaries describe exactly the keys that are there."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from backends import every_backend, using
from hipserve.config import IndexForm
from hipserve.ops import build_index, write_kv
from hipserve.ops.codes import encode, rotate, rotation_size, unpack
from hipserve.plan import bound_levels, bound_offsets
from hipserve.testing.cases import Pages, Shape, empty_pages
from hipserve.types import KeyIndex, KeyPool

SEEDS = st.integers(0, 2**31 - 1)


def center_and_radius(keys: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of `keys` `[n, ...]` on the finest level, else middle and a quarter of the
    width of their box."""
    if level == 0:
        return keys.mean(0), keys.std(0, unbiased=False)
    low, high = keys.aminmax(dim=0)
    return (low + high) / 2, (high - low) / 4


def assert_indexed(kv: Pages, page: int, keys: torch.Tensor, size: int) -> None:
    """`keys` `[n, heads, head_dim]` is what the page holds from its start."""
    index = kv.index
    assert index.summaries is not None
    sizes = (kv.pool.page_size, size, index.num_runs)
    offsets = bound_offsets(*sizes)
    for level, length in enumerate(bound_levels(*sizes)):
        for run, inside in enumerate(keys.split(length)):
            at = (page, offsets[level] + run)
            middle, half = center_and_radius(inside.double(), level)
            if index.summary_scales is None:
                center, radius = index.summaries[at].unbind(1)
                assert torch.equal(center, middle.to(center.dtype))
                torch.testing.assert_close(radius, half.to(center.dtype), atol=1e-7, rtol=1e-6)
            else:
                sides = torch.stack([middle, half], dim=1)
                near(index.summaries[at], index.summary_scales[at], sides, 1 / 127)
    if index.code_scales is not None:
        numbers = unpack(index.codes[page, : len(keys)], index.code_bits)
        limit = 2 ** (index.code_bits - 1) - 1
        near(numbers, index.code_scales[page, : len(keys)], rotate(keys), 1 / limit)


def near(numbers: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, step: float) -> None:
    """Codes are as near to x `[..., n]` as their bits allow, with scales rounded up."""
    half = scales.double()[..., None] / 2
    assert bool(((numbers.double() * 2 * half - x).abs() <= half * 1.001 + 1e-9).all())
    top = x.abs().amax(-1, keepdim=True)
    assert bool((2 * half <= 2 * step * top + 1e-9).all())


def assert_same_index(a: KeyIndex, b: KeyIndex, seen: torch.Tensor) -> None:
    """Equal bit by bit in the pages `seen`."""
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(x[seen], y[seen])


@every_backend
@given(seed=SEEDS)
def test_appending_truncating_and_rewriting(backend: str, seed: int) -> None:
    rng = random.Random(seed)
    bits = rng.choice([4, 8, 16])
    shape = Shape(
        (1,),
        (1,),
        head_dim=rng.choice([64, 80, 512]),
        page_size=rng.choice([16, 64, 256]),
        dtype=rng.choice([torch.float32, torch.bfloat16, torch.float16]),
    )
    kv, length = empty_pages(3, shape, IndexForm(16, bits)), 0
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
                    assert_indexed(kv, page, held, 16)


@every_backend
def test_skipped_tokens_leave_no_trace(backend: str) -> None:
    kv = empty_pages(2, Shape((1,), (1,)))
    k = torch.randn(3, 2, 64)
    with using(backend) as name:
        write_kv(k, k, kv.pool, kv.index, torch.tensor([-1, 64, -1]), backend=name)
    assert bool(kv.pool.k_cache[0].isnan().all())
    assert torch.equal(kv.pool.k_cache[1, 0], k[1])
    assert bool(kv.pool.k_cache[1, 1:].isnan().all())
    assert_indexed(kv, 1, k[1:2], 16)


@every_backend
def test_slots_that_jump_between_pages(backend: str) -> None:
    kv = empty_pages(2, Shape((1,), (1,)))
    k = torch.randn(24, 2, 64)
    with using(backend) as name:
        write_kv(k[:19], k[:19], kv.pool, kv.index, torch.arange(19), backend=name)
        write_kv(k[19:22], k[19:22], kv.pool, kv.index, torch.tensor([19, 64, 3]), backend=name)
    held = torch.cat([k[:3], k[21:22], k[4:20]])
    assert_indexed(kv, 0, held, 16)
    assert_indexed(kv, 1, k[20:21], 16)


@every_backend
def test_strided_keys(backend: str) -> None:
    kv = empty_pages(1, Shape((1,), (1,)))
    fused = torch.randn(20, 8, 64)
    with using(backend) as name:
        write_kv(fused[:, 4:6], fused[:, 6:8], kv.pool, kv.index, torch.arange(20), backend=name)
    assert torch.equal(kv.pool.k_cache[0, :20], fused[:, 4:6])
    assert torch.equal(kv.pool.v_cache[0, :20], fused[:, 6:8])


@every_backend
@given(seed=SEEDS)
def test_index_of_whole_sequences(backend: str, seed: int) -> None:
    rng = random.Random(seed)
    shape = (2, rng.choice([1, 15, 16, 17, 255, 256, 300, 1000]), 2, rng.choice([48, 64, 80, 128]))
    k = torch.randn(shape).to(rng.choice([torch.float32, torch.bfloat16, torch.float16]))
    k *= rng.choice([0.0, 1e-3, 1.0, 100.0])
    bits = rng.choice([4, 8, 16])
    with using(backend) as name:
        index = build_index(k, code_bits=bits, backend=name)
    for page in range(2):
        assert_indexed(Pages(KeyPool(k, k), index), page, k[page], 16)
    expected = build_index(k, code_bits=bits, backend="reference")
    assert_same_index(index, expected, torch.tensor([True, True]))


@every_backend
def test_codes_without_summaries(backend: str) -> None:
    k = torch.randn(1, 40, 2, 64)
    with using(backend) as name:
        index = build_index(k, run_size=None, code_bits=4, backend=name)
    assert index.summaries is None
    assert index.head_dim == 64
    numbers = unpack(index.codes, 4)
    assert index.code_scales is not None
    near(numbers, index.code_scales, rotate(k), 1 / 7)


def test_rotated_rows_have_the_same_product() -> None:
    a, b = torch.randn(2, 5, 96).double()
    assert rotation_size(96) == 32
    torch.testing.assert_close(
        (rotate(a) * rotate(b)).sum(-1).double() / 32, (a * b).sum(-1), atol=1e-4, rtol=1e-4
    )


def test_one_large_channel_leaves_the_others_their_bits() -> None:
    """Four bits hold what a query asks of keys that have a channel 30 times the others."""
    k, q = torch.randn(200, 128), torch.randn(50, 128)
    k[:, 7] += 30
    exact = q @ k.mT

    def error(rows: torch.Tensor, queries: torch.Tensor, size: int) -> float:
        code = encode(rows, 4)
        scores = queries @ (code.numbers * code.scales[:, None]).mT / size
        difference = scores - exact
        return float((difference - difference.mean(1, keepdim=True)).std())

    assert error(rotate(k), rotate(q), 128) < error(k, q, 1) / 2
