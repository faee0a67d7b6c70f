"""Pages in fp8 mean what pages with the numbers they hold, times their scales, would mean."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hipserve import ArgumentError, BackendError, HiPConfig, platform
from hipserve.attention import AttentionLayer, HeldKeys
from hipserve.attention.crossover import rule_of
from hipserve.attention.meter import Meter
from hipserve.config import IndexForm
from hipserve.ops import block_sparse_attention, build_index, select_blocks, write_kv
from hipserve.ops.fp8 import to_pages
from hipserve.platform import FP8_DTYPES
from hipserve.testing.cases import Case, Shape, empty_pages, make_case, random_config, random_shape
from hipserve.testing.laws import assert_lawful
from hipserve.testing.oracle import assert_as_exact, readable
from hipserve.types import KeyPool

SEEDS = st.integers(0, 2**31 - 1)
SMALL = HiPConfig(budget=64, sliding_window=32, num_sink_tokens=16, dense_below=0)
E4M3 = torch.float8_e4m3fn


def random_case(seed: int, *scales: float) -> tuple[Case, HiPConfig]:
    rng = random.Random(seed)
    shape = random_shape(rng, (torch.bfloat16, torch.float16, torch.float32))
    config = random_config(rng, shape.page_size, shape.num_kv_heads)
    scaled = {"k_scale": rng.choice(scales), "v_scale": rng.choice(scales)}
    shape = replace(shape, page_dtype=rng.choice(FP8_DTYPES), **scaled)
    return make_case(shape, config.index_form), config


def dequantised(case: Case, form: IndexForm) -> tuple[KeyPool, object]:
    """Pages of what the pages of `case` hold, in the dtype of q, and an index of them."""
    pool, dtype = case.pool, case.q.dtype
    k = (pool.k_cache.double() * pool.k_scale).to(dtype).nan_to_num()
    v = (pool.v_cache.double() * pool.v_scale).to(dtype).nan_to_num()
    return KeyPool(k, v), build_index(k, **form._asdict(), backend="reference")


@given(seed=SEEDS)
def test_attention_is_exact(seed: int) -> None:
    case, config = random_case(seed, 1.0, 0.013, 7.0)
    options = {"config": config, "backend": "reference"}
    chosen = select_blocks(case.q, case.index, case.layout, **options)
    assert_lawful(chosen, case, config)
    options["softcap"] = case.shape.softcap
    for selection in (chosen, None):
        out, lse = block_sparse_attention(case.q, case.pool, case.layout, selection, **options)
        assert_as_exact(out, lse, case, readable(case, selection, config))


@given(seed=SEEDS)
def test_a_search_finds_what_it_finds_in_dequantised_pages(seed: int) -> None:
    """A power of two as scale changes no bit but exponents; q in bfloat16, as its summaries are."""
    rng = random.Random(seed)
    shape = Shape((700, 65), (70, 1), page_size=64, dtype=torch.bfloat16, seed=seed)
    shape = replace(shape, page_dtype=rng.choice(FP8_DTYPES), k_scale=rng.choice([1.0, 0.25]))
    config = random_config(rng, 64, 2).replace(sliding_window=16, budget=64)
    case = make_case(shape, config.index_form)
    _, index = dequantised(case, config.index_form)
    options = {"config": config, "backend": "reference"}
    found = select_blocks(case.q, case.index, case.layout, **options)
    expected = select_blocks(case.q, index, case.layout, **options)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_an_index_made_in_parts_is_that_of_whole_pages(dtype: torch.dtype, bits: int) -> None:
    shape = Shape((1,), (1,), page_size=64, dtype=torch.float16, page_dtype=dtype, k_scale=0.3)
    kv = empty_pages(2, shape, IndexForm(16, bits))
    k = torch.randn(128, 2, 64).half()
    for begin, end in ((0, 100), (40, 41), (41, 50), (50, 128)):  # one is written again
        slots = torch.arange(begin, end)
        write_kv(k[begin:end], k[begin:end], kv.pool, kv.index, slots, backend="reference")
    held = to_pages(k, dtype, 0.3).float()
    assert torch.equal(kv.pool.k_cache.float().flatten(0, 1), held)
    assert torch.equal(kv.pool.v_cache.float().flatten(0, 1), to_pages(k, dtype, 1.0).float())
    whole = build_index(kv.pool.k_cache, code_bits=bits, backend="reference")
    for mine, theirs in zip(kv.index.tensors(), whole.tensors(), strict=True):
        assert torch.equal(mine, theirs)
    plain = build_index(kv.pool.k_cache.bfloat16(), code_bits=bits, backend="reference")
    for mine, theirs in zip(whole.tensors(), plain.tensors(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_numbers_are_rounded_and_no_larger_than_fp8(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([[0.0, -1e9, 1e9, 1.0, 1.0625, 3 * 2.0**-17, torch.nan]])
    held = to_pages(x, dtype, 1.0).float()[0]
    assert held[:4].tolist() == [0.0, -largest, largest, 1.0]
    assert held[4] == 1.0  # between two numbers, the even one
    assert held[6].isnan()
    assert to_pages(torch.tensor([3.0]), dtype, 0.5).float() == 6


def test_a_meter_knows_the_scale() -> None:
    shape = Shape((1200,), (1200,), page_size=64, page_dtype=E4M3, k_scale=0.25, v_scale=2.0)
    case = make_case(shape, SMALL.index_form)
    pool, index = dequantised(case, SMALL.index_form)
    masses = []
    for keys in (HeldKeys(case.pool, case.index, case.layout), HeldKeys(pool, index, case.layout)):
        meter, rule = Meter(0), rule_of(SMALL, case.q, 2)
        AttentionLayer(SMALL, rule, meter=meter, backend="reference").forward(case.q, keys)
        masses.append(meter.mass)
    assert masses[0].count == masses[1].count > 0
    assert abs(masses[0].mean - masses[1].mean) < 1e-5


def test_native_kernels_read_no_fp8() -> None:
    case = make_case(Shape((100,), (40,), page_dtype=E4M3))
    with pytest.raises(BackendError, match="reads no pages in float8_e4m3fn"):
        block_sparse_attention(case.q, case.pool, case.layout, backend="cpu")
    with pytest.raises(BackendError, match="reads no pages in float8_e4m3fn"):
        select_blocks(case.q, case.index, case.layout, backend="cpu")
    with pytest.raises(BackendError, match="reads no pages in float8_e4m3fn"):
        build_index(case.pool.k_cache, backend="cpu")
    auto, _ = block_sparse_attention(case.q, case.pool, case.layout)
    plain, _ = block_sparse_attention(case.q, case.pool, case.layout, backend="reference")
    assert torch.equal(auto, plain)


def test_gpus_that_cannot_convert_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    refusal = platform.key_refusal("triton", gpu, E4M3)
    assert refusal == "float8_e4m3fn needs compute capability 8.9, and this GPU has 8.0"
    assert not platform.key_refusal("triton", gpu, torch.float8_e5m2)
    assert not platform.key_refusal("triton", gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert not platform.key_refusal("triton", gpu, E4M3)


def test_bad_scales_and_dtypes_are_refused() -> None:
    q = torch.zeros(4, 4, 64)
    plain = make_case(Shape((4,), (4,)))
    case = make_case(Shape((4,), (4,), page_dtype=E4M3))
    for bad in (0.0, -1.0, torch.nan, torch.inf, "1", None, True):
        for name in ("k_scale", "v_scale"):
            pool = replace(case.pool, **{name: bad})
            with pytest.raises(ArgumentError, match=f"{name}: expected a positive finite number"):
                block_sparse_attention(q, pool, case.layout)
    with pytest.raises(ArgumentError, match="v_scale: expected 1, as pages are not in fp8"):
        block_sparse_attention(q, replace(plain.pool, v_scale=2.0), plain.layout)
    mixed = KeyPool(case.pool.k_cache, plain.pool.v_cache)
    with pytest.raises(ArgumentError, match="v_cache: expected dtype float8_e4m3fn"):
        block_sparse_attention(q, mixed, case.layout)
    wrong = replace(case.index, summaries=case.index.summaries.float())
    with pytest.raises(ArgumentError, match="summaries: expected dtype bfloat16"):
        select_blocks(q, wrong, case.layout)
