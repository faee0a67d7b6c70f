"""The Triton kernels on pages in fp8 against the definition, as in `test_kernels.py`."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_kernels import (
    CASES,
    DEVICE,
    DTYPES,
    GPU,
    SMALL,
    assert_selects_as_defined,
    complete_rows,
    moved,
    pytestmark,
    small,
)

from hipserve import HiPConfig
from hipserve.config import IndexForm
from hipserve.ops import block_sparse_attention, build_index, select_blocks, write_kv
from hipserve.platform import FP8_DTYPES
from hipserve.testing.cases import Shape, empty_pages, make_case
from hipserve.testing.oracle import assert_as_exact, readable
from hipserve.types import BlockSelection

__all__ = ["pytestmark"]

on_gpu = pytest.mark.skipif(not GPU, reason="no GPU")


def in_fp8(seed: int, *scales: float) -> tuple[Shape, HiPConfig]:
    shape, config = small(seed)
    rng = random.Random(seed)
    scaled = {"k_scale": rng.choice(scales), "v_scale": rng.choice(scales)}
    return replace(shape, page_dtype=rng.choice(FP8_DTYPES), **scaled), config


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """`[...]` of one shape and dtype, fp8 included, where a number is expected.

    The interpreter cuts bfloat16 off instead of rounding it.
    """
    near = 2**-7 if expected.dtype == torch.bfloat16 and not GPU else 0
    got, expected = got.cpu().float(), expected.float()
    seen = expected.isfinite()
    torch.testing.assert_close(got[seen], expected[seen], rtol=near, atol=near / 1000)


@pytest.mark.parametrize("seed", range(CASES))
def test_selection_equals_the_definition(seed: int) -> None:
    assert_selects_as_defined(*in_fp8(seed, 1.0, 0.25))


@pytest.mark.parametrize("seed", range(CASES))
def test_attention_is_exact(seed: int) -> None:
    shape, config = in_fp8(2000 + seed, 1.0, 0.013, 7.0)
    case = make_case(shape, config.index_form)
    q, kv, layout = moved(case)
    chosen = select_blocks(case.q, case.index, case.layout, config=config, backend="reference")
    there = BlockSelection(chosen.indices.to(DEVICE), chosen.window_start.to(DEVICE))
    for selection, mask in ((there, chosen), (None, None)):
        out, lse = block_sparse_attention(
            q, kv.pool, layout, selection, config=config, softcap=shape.softcap, backend="triton"
        )
        assert_as_exact(out.cpu(), lse.cpu(), case, readable(case, mask, config))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_dtype", FP8_DTYPES)
def test_prefill_and_decode(page_dtype: torch.dtype, dtype: torch.dtype, head_dim: int) -> None:
    """Tiles of many rows, and lists that are split, with windows of a model and without."""
    shape = Shape(
        (300, 97, 1000),
        (64 if GPU else 20, 1, 1),
        group_size=4,
        head_dim=head_dim,
        dtype=dtype,
        page_dtype=page_dtype,
        k_scale=0.3,
        v_scale=3.0,
    )
    case = make_case(shape)
    q, kv, layout = moved(case)
    for window in (0, 37):
        out, lse = block_sparse_attention(
            q, kv.pool, layout, sliding_window=window, backend="triton"
        )
        masks = readable(case, None, HiPConfig(), window)
        assert_as_exact(out.cpu(), lse.cpu(), case, masks)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_pages_and_index_equal_the_definition(dtype: torch.dtype, bits: int) -> None:
    """By chunks, by single rows, late and at once, in pages that an earlier owner has filled."""
    shape = Shape((1,), (1,), page_size=64, page_dtype=dtype, k_scale=0.7, v_scale=0.01)
    pages = [empty_pages(4, shape, IndexForm(16, bits)) for _ in range(2)]
    pages[0] = pages[0].map(lambda x: x.to(DEVICE))
    there, here = pages
    g = torch.Generator().manual_seed(bits)
    slots_of = torch.arange(256).view(2, 128)
    for late, (begin, end) in itertools.product(
        (False, True), itertools.pairwise([0, 128, 0, 15, 16, 17, 63, 64, 100, 127, 128])
    ):
        if end < begin:
            continue  # another owner
        slots = torch.cat([slots_of[:, begin:end].flatten(), torch.tensor([-1])])
        k = torch.randn(len(slots), shape.num_kv_heads, shape.head_dim, generator=g)
        options: dict[str, Any] = {"whole_runs": late, "apart": late and end - begin == 1}
        given = (x.to(DEVICE) for x in (k, 2 * k))
        write_kv(*given, there.pool, there.index, slots.to(DEVICE), backend="triton", **options)
        write_kv(k, 2 * k, here.pool, here.index, slots, backend="reference")
        for got, expected in zip(there.tensors, here.tensors, strict=True):
            rows = complete_rows(got.shape[1], 64, end) if late else ...
            assert_same(got.flatten(0, 1)[rows], expected.flatten(0, 1)[rows])


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_an_index_of_whole_pages(dtype: torch.dtype, bits: int) -> None:
    k = (3 * torch.randn(3, 300, 2, 80)).to(dtype)
    some = torch.tensor([2, 0])  # as pages that a request of vLLM finds are copied
    got = build_index(k.to(DEVICE)[some.to(DEVICE)], code_bits=bits, backend="triton")
    expected = build_index(k[some], code_bits=bits, backend="reference")
    for mine, theirs in zip(got.tensors(), expected.tensors(), strict=True):
        assert_same(mine, theirs)


@on_gpu
def test_a_graph_writes_selects_and_attends() -> None:
    """A step of decoding, replayed: what it reads of scales is part of it."""
    shape = Shape((600, 300), (1, 1), 8, 4, 128, 256, torch.bfloat16)
    shape = replace(shape, page_dtype=torch.float8_e4m3fn, k_scale=0.02, v_scale=0.03)
    config = SMALL.replace(query_block_size=64)
    case = make_case(shape, config.index_form)
    q, kv, layout = moved(case)
    last = layout.seq_lens.long() - 1
    pages = layout.block_table.gather(1, (last // 256)[:, None])[:, 0].long()
    slots = pages * 256 + last % 256
    k, v = torch.randn(2, 2, 8, 128, dtype=torch.bfloat16, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        write_kv(k, v, kv.pool, kv.index, slots, whole_runs=True, apart=True, check=False)
        chosen = select_blocks(q, kv.index, layout, config=config, check=False)
        out, _ = block_sparse_attention(q, kv.pool, layout, chosen, config=config, check=False)
        return out, chosen.indices

    eager = [x.clone() for x in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    graph.replay()
    for got, expected in zip(replayed, eager, strict=True):
        assert torch.equal(got, expected)
    k.mul_(2)
    graph.replay()
    expected = (2 * k.float() / 2 / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    rows = kv.pool.k_cache[pages, last % 256].float()
    assert torch.equal(rows, expected)
