"""The Triton kernels against the definition: on a GPU, or in Triton's interpreter without one.

`TRITON_INTERPRET=1 python -m pytest tests/gpu` interprets; bfloat16 is for GPUs alone, as the
interpreter computes it wrongly.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from hipserve import BackendError, HiPConfig, hip_attention
from hipserve.attention import absorb_sinks
from hipserve.config import IndexForm
from hipserve.ops import (
    block_sparse_attention,
    build_index,
    refresh_blocks,
    select_blocks,
    write_kv,
)
from hipserve.plan import BatchLayout, bound_levels
from hipserve.platform import interpreting
from hipserve.testing.cases import (
    Case,
    Pages,
    Shape,
    empty_pages,
    make_case,
    random_config,
    random_shape,
)
from hipserve.testing.oracle import assert_as_exact, readable
from hipserve.types import BlockSelection, KeyPool

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not (GPU or interpreting()), reason="no GPU and no interpreter")

DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if GPU else ()))
SMALL = HiPConfig(
    budget=64, sliding_window=32, num_sink_tokens=16, query_block_size=16, dense_below=0
)
CASES = 300 if GPU else 6


def moved(case: Case) -> tuple[torch.Tensor, Pages, BatchLayout]:
    there = case.on(DEVICE)
    return there.q, there.kv, there.layout


def small(seed: int) -> tuple[Shape, HiPConfig]:
    """A random case with few query rows, so that it can be interpreted.

    Where every row is a query block, three rows are as many programs as seventeen in larger blocks.
    """
    rng = random.Random(seed)
    shape = random_shape(rng, DTYPES)
    rows = [min(n, rng.choice([1, 3, 17])) for n in shape.query_lens]
    config = random_config(rng, shape.page_size, shape.num_kv_heads)
    if config.query_block_size == 1 and not GPU:
        rows = [min(n, 3) for n in rows]
    return replace(shape, query_lens=tuple(rows)), config


@pytest.mark.parametrize("seed", range(CASES))
def test_selection_equals_the_definition(seed: int) -> None:
    assert_selects_as_defined(*small(seed))


def assert_selects_as_defined(shape: Shape, config: HiPConfig) -> None:
    """On a grid, where sums are exact."""
    case = make_case(replace(shape, kind="grid"), config.index_form)
    q, kv, layout = moved(case)
    got = select_blocks(q, kv.index, layout, config=config, backend="triton")
    expected = select_blocks(case.q, case.index, case.layout, config=config, backend="reference")
    assert torch.equal(got.indices.cpu(), expected.indices)
    assert torch.equal(got.window_start.cpu(), expected.window_start)


@pytest.mark.parametrize("code_bits", [16, 8])
@pytest.mark.parametrize(("length", "rows"), [(36_011, 3), (540_017, 1)])
def test_searches_begin_with_the_same_long_runs(length: int, rows: int, code_bits: int) -> None:
    """One level of them, and two; a short sequence has none of its own."""
    config = SMALL.replace(
        key_block_size=1, bound_block_size=1, code_bits=code_bits, decode_dense_below=0
    )
    shape = Shape((length, 1500), (rows, 1), 1, head_dim=16, page_size=16, kind="grid")
    case = make_case(shape, config.index_form, backend="auto")
    q, kv, layout = moved(case)
    got = select_blocks(q, kv.index, layout, config=config, backend="triton")
    expected = select_blocks(case.q, case.index, case.layout, config=config, backend="reference")
    assert torch.equal(got.indices.cpu(), expected.indices)


@pytest.mark.parametrize("seed", range(CASES))
def test_attention_is_exact_over_what_was_chosen(seed: int) -> None:
    shape, config = small(1000 + seed)
    case = make_case(shape, config.index_form)
    q, kv, layout = moved(case)
    chosen = select_blocks(case.q, case.index, case.layout, config=config, backend="reference")
    there = BlockSelection(chosen.indices.to(DEVICE), chosen.window_start.to(DEVICE))
    out, lse = block_sparse_attention(
        q, kv.pool, layout, there, config=config, softcap=shape.softcap, backend="triton"
    )
    assert_as_exact(out.cpu(), lse.cpu(), case, readable(case, chosen, config))


@pytest.mark.parametrize("sliding_window", [0, 37])
def test_dense_and_windowed_layers(sliding_window: int) -> None:
    case = make_case(Shape((150, 1, 70), (20, 1, 0), group_size=3, head_dim=80))
    q, kv, layout = moved(case)
    out, lse = block_sparse_attention(
        q, kv.pool, layout, sliding_window=sliding_window, backend="triton"
    )
    masks = readable(case, None, HiPConfig(), sliding_window)
    assert_as_exact(out.cpu(), lse.cpu(), case, masks)


def test_decode_splits_its_keys_and_merges_them() -> None:
    case = make_case(Shape((700, 3), (1, 1), num_kv_heads=1, group_size=4))
    q, kv, layout = moved(case)
    out, lse = block_sparse_attention(q, kv.pool, layout, backend="triton")
    assert_as_exact(out.cpu(), lse.cpu(), case, readable(case, None, HiPConfig()))


@pytest.mark.parametrize("query_lens", [(20,), (1,)])
@pytest.mark.parametrize("head_dim", [320, 512])
def test_heads_as_wide_as_gemma_4s(head_dim: int, query_lens: tuple[int, ...]) -> None:
    """Selected index for index, attended as exactly as float64 says; prefill, and split keys."""
    shape = Shape((200,), query_lens, 1, group_size=2, head_dim=head_dim, kind="grid")
    case = make_case(shape)
    q, kv, layout = moved(case)
    expected = select_blocks(case.q, case.index, case.layout, config=SMALL, backend="reference")
    got = select_blocks(q, kv.index, layout, config=SMALL, backend="triton")
    assert torch.equal(got.indices.cpu(), expected.indices)
    assert bool((expected.indices >= 0).any())
    out, lse = block_sparse_attention(q, kv.pool, layout, got, config=SMALL, backend="triton")
    assert_as_exact(out.cpu(), lse.cpu(), case, readable(case, expected, SMALL))


def test_learned_sinks_are_absorbed() -> None:
    case = make_case(Shape((60, 9), (5, 1)))
    q, kv, layout = moved(case)
    sinks = torch.tensor([-1.0, 0.5, 3.0, -torch.inf])
    got = absorb_sinks(
        *block_sparse_attention(q, kv.pool, layout, backend="triton"), sinks.to(DEVICE)
    )
    dense = block_sparse_attention(case.q, case.pool, case.layout, backend="reference")
    for one, other in zip(got, absorb_sinks(*dense, sinks), strict=True):
        torch.testing.assert_close(one.cpu(), other)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_only_flagged_blocks_select_anew(backend: str) -> None:
    case = make_case(Shape((400, 300, 350), (1, 1, 1), kind="grid"))
    q, kv, layout = moved(case)
    fresh = select_blocks(q, kv.index, layout, config=SMALL, backend=backend)
    kept = BlockSelection(torch.full_like(fresh.indices, 7), torch.full_like(fresh.window_start, 9))
    flags = torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)
    refresh_blocks(q, kv.index, layout, kept, flags, config=SMALL, backend=backend)
    assert torch.equal(kept.indices[[0, 2]], fresh.indices[[0, 2]])
    assert torch.equal(kept.window_start[[0, 2]], fresh.window_start[[0, 2]])
    assert bool((kept.indices[1] == 7).all())
    assert int(kept.window_start[1]) == 9


def test_scratch_in_several_launches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from hipserve.ops.select_blocks.triton import launch

    case = make_case(Shape((400,), (64,), num_kv_heads=1, kind="grid"))
    q, kv, layout = moved(case)
    whole = select_blocks(q, kv.index, layout, config=SMALL, backend="triton")
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 1)
    assert torch.equal(
        whole.indices, select_blocks(q, kv.index, layout, config=SMALL, backend="triton").indices
    )


def test_heads_may_lie_further_apart_than_32_bits_count() -> None:
    """As in `[1, heads, tokens, head_dim].transpose(1, 2)` with a million tokens."""
    apart = 2**30
    room = torch.empty(2 * apart + 128, dtype=torch.float16, device=DEVICE)  # mostly untouched

    def spread(x: torch.Tensor) -> torch.Tensor:
        return room.as_strided((8, 3, 16), (16, apart, 1)).copy_(x)

    q, k, v = torch.randn(3, 8, 3, 16).half()
    layout = BatchLayout.of(torch.zeros(1, 1, dtype=torch.int32), [8], [8])
    expected, _ = block_sparse_attention(q, KeyPool(k[None], v[None]), layout, backend="reference")
    layout = BatchLayout.of(torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), [8], [8])
    near = [x.to(DEVICE) for x in (q, k, v)]
    for far in range(3):
        q, k, v = (spread(x) if i == far else x for i, x in enumerate(near))
        out, _ = block_sparse_attention(q, KeyPool(k[None], v[None]), layout, backend="triton")
        torch.testing.assert_close(out.cpu(), expected, atol=2e-3, rtol=2e-3)
        got = build_index(k[None], backend="triton").summaries
        expected_index = build_index(near[1][None].cpu(), backend="reference")
        assert torch.equal(got.cpu(), expected_index.summaries)


@pytest.mark.parametrize("query_len", [1, 40])
def test_the_result_takes_the_room_it_is_given(query_len: int) -> None:
    q, kv, layout = moved(make_case(Shape((300,), (query_len,))))
    options: dict[str, Any] = {"backend": "triton"}
    expected, lse = block_sparse_attention(q, kv.pool, layout, **options)
    room = torch.full_like(q, torch.nan)
    out, same = block_sparse_attention(q, kv.pool, layout, out=room, **options)
    assert out is room
    assert torch.equal(out, expected)
    assert torch.equal(same, lse)


@pytest.mark.parametrize("seed", range(6))
def test_pages_and_bounds(seed: int) -> None:
    """Jumping, repeated and skipped slots; compared where the definition is finite."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = Shape((1,), (1,), num_kv_heads=rng.choice([1, 2, 3]), page_size=rng.choice([16, 64]))
    pages = [empty_pages(4, shape) for _ in range(2)]
    pages[0] = pages[0].map(lambda x: x.to(DEVICE))
    there, here = pages
    for _ in range(4):
        count = rng.choice([1, 3, 20])
        slots = torch.randperm(4 * shape.page_size, generator=g)[:count]
        if rng.random() < 0.6:
            slots = slots[0] % (3 * shape.page_size) + torch.arange(count)
        slots[torch.rand(count, generator=g) < 0.1] = -1
        k = torch.randn(count, shape.num_kv_heads, shape.head_dim, generator=g)
        moved_k, moved_slots = k.to(DEVICE), slots.to(DEVICE)
        write_kv(moved_k, 2 * moved_k, there.pool, there.index, moved_slots, backend="triton")
        write_kv(k, 2 * k, here.pool, here.index, slots, backend="reference")
        for got, expected in zip(there.tensors, here.tensors, strict=True):
            seen = expected.isfinite()
            assert torch.equal(got.cpu()[seen], expected[seen])


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_runs_are_summarised_when_they_are_complete(page_size: int, bits: int) -> None:
    """By chunks and by single rows of two sequences, in pages that an earlier owner has filled."""
    shape = Shape((1,), (1,), page_size=page_size)
    pages = [empty_pages(4, shape, IndexForm(16, bits)) for _ in range(2)]
    pages[0] = pages[0].map(lambda x: x.to(DEVICE))
    there, here = pages
    g, whole = torch.Generator().manual_seed(page_size), 2 * page_size
    slots_of = torch.arange(2 * whole).view(2, whole)
    near = {at for edge in (16, page_size) for at in range(edge - 2, edge + 3)}
    for begin, end in itertools.pairwise([0, whole, 0, *sorted(near), whole - 1, whole]):
        if end < begin:
            continue  # another owner
        slots = torch.cat([slots_of[:, begin:end].flatten(), torch.tensor([-1])])
        k = torch.randn(len(slots), shape.num_kv_heads, shape.head_dim, generator=g)
        apart = end - begin == 1
        options: dict[str, Any] = {"whole_runs": True, "apart": apart}
        moved = (x.to(DEVICE) for x in (k, 2 * k))
        write_kv(*moved, there.pool, there.index, slots.to(DEVICE), backend="triton", **options)
        write_kv(k, 2 * k, here.pool, here.index, slots, backend="reference", **options)
        for got, expected in zip(there.tensors, here.tensors, strict=True):
            rows = complete_rows(got.shape[1], page_size, end)
            assert torch.equal(got.cpu().flatten(0, 1)[rows], expected.flatten(0, 1)[rows])


def complete_rows(per_page: int, page_size: int, end: int) -> torch.Tensor:
    """Which rows of `per_page` a page are complete in two sequences of two pages and `end` keys."""
    lengths = [1] if per_page == page_size else bound_levels(page_size, 16, per_page)
    behind = torch.cat([torch.arange(n, page_size + 1, n) for n in lengths])
    in_pages = torch.arange(4)[:, None] % 2 * page_size + behind
    return (in_pages <= end).flatten()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 300])
def test_bounds_of_whole_sequences(length: int) -> None:
    k = torch.randn(2, length, 2, 80)
    got = build_index(k.to(DEVICE), backend="triton").summaries
    assert torch.equal(got.cpu(), build_index(k, backend="reference").summaries)


def test_a_budget_of_everything_is_dense_attention() -> None:
    q, k, v = (torch.randn(1, 96, heads, 64).to(DEVICE) for heads in (4, 2, 2))
    options: dict[str, Any] = {"config": SMALL.replace(budget=128)}
    got = hip_attention(q, k, v, backend="triton", **options)
    expected = hip_attention(q.cpu(), k.cpu(), v.cpu(), backend="reference", **options)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got.cpu(), expected)


def test_key_blocks_that_are_no_power_of_two_are_refused() -> None:
    case = make_case(Shape((100,), (1,)))
    q, kv, layout = moved(case)
    config = HiPConfig(key_block_size=24, budget=48, num_sink_tokens=0, selector="tree")
    with pytest.raises(BackendError, match="power of two, not 24"):
        select_blocks(q, kv.index, layout, config=config, backend="triton")
