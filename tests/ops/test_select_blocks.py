"""Which blocks: laws of a selection, the native search against the definition, and statistics."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends import every_backend, every_tier, native, using
from hipserve import HiPConfig
from hipserve.ops import build_index, select_blocks
from hipserve.ops.select_blocks.reference import IndexedKeys, SeenKeys, TreeSearch, sample_rows
from hipserve.ops.select_blocks.spec import search_spec
from hipserve.plan import BatchLayout
from hipserve.selectors import SELECTORS
from hipserve.testing.cases import Shape, make_case, random_config, random_shape
from hipserve.testing.laws import assert_lawful
from hipserve.types import KeyIndex

SEEDS = st.integers(0, 2**31 - 1)


@every_backend
@given(seed=SEEDS)
def test_selections_are_lawful(backend: str, seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng, (torch.float32, torch.bfloat16))
    config = random_config(rng, shape.page_size, shape.num_kv_heads)
    case = make_case(shape, config.index_form)
    with using(backend) as name:
        selection = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
    assert_lawful(selection, case, config)


@native
@every_tier
@given(seed=SEEDS)
def test_native_search_equals_the_definition(tier: str, seed: int) -> None:
    """Index for index: values on a coarse grid make every dot product exact in any order."""
    rng = random.Random(seed)
    shape = random_shape(rng, (torch.float32, torch.bfloat16))
    config = random_config(rng, shape.page_size, shape.num_kv_heads)
    case = make_case(replace(shape, kind="grid"), config.index_form)
    expected = select_blocks(case.q, case.index, case.layout, config=config, backend="reference")
    with using(f"cpu:{tier}") as name:
        got = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
    assert torch.equal(got.window_start, expected.window_start)
    assert torch.equal(got.indices, expected.indices)


@every_backend
@pytest.mark.parametrize("page_size", [96, 320])
def test_pages_that_coarse_runs_would_straddle_have_fine_ones_only(
    backend: str, page_size: int
) -> None:
    case = make_case(Shape((900, 333), (70, 1), page_size=page_size, kind="grid"))
    config = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32, dense_below=0)
    assert case.kv.index.summaries is not None
    assert case.kv.index.summaries.shape[1] == page_size // 16
    pages = make_case(replace(case.shape, page_size=16))
    expected = select_blocks(
        pages.q, pages.kv.index, pages.layout, config=config, backend="reference"
    )
    with using(backend) as name:
        got = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
    assert torch.equal(got.indices, expected.indices)


@native
@every_tier
@pytest.mark.parametrize("rows", [1, 130])
@pytest.mark.parametrize("head_dim", [272, 512])
def test_native_search_of_wide_heads_equals_the_definition(
    tier: str, rows: int, head_dim: int
) -> None:
    shape = Shape((1100,), (rows,), head_dim=head_dim, dtype=torch.bfloat16, kind="grid")
    case = make_case(shape)
    config = HiPConfig(budget=128, sliding_window=16, num_sink_tokens=16, dense_below=0)
    expected = select_blocks(case.q, case.index, case.layout, config=config, backend="reference")
    with using(f"cpu:{tier}") as name:
        got = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
    assert bool((expected.indices >= 0).any())
    assert torch.equal(got.indices, expected.indices)


@every_backend
def test_a_budget_of_everything_selects_nothing_and_reads_all(backend: str) -> None:
    case = make_case(Shape((700,), (700,)))
    config = HiPConfig(budget=704, sliding_window=16, num_sink_tokens=16, dense_below=0)
    with using(backend) as name:
        selection = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
    assert bool((selection.window_start == 16).all())
    assert bool((selection.indices == -1).all())


@every_backend
@pytest.mark.parametrize("selector", SELECTORS)
def test_future_keys_change_no_earlier_block(backend: str, selector: str) -> None:
    config = HiPConfig(
        selector=selector, budget=64, sliding_window=16, num_sink_tokens=16, dense_below=0
    )
    long = make_case(Shape((1500,), (1500,), page_size=256))
    short = Shape((1024,), (1024,), page_size=256)
    from hipserve.testing.cases import in_pages

    kv, layout = in_pages([long.ks[0][:1024]], [long.vs[0][:1024]], short)
    with using(backend) as name:
        whole = select_blocks(long.q, long.index, long.layout, config=config, backend=name)
        part = select_blocks(long.q[:1024], kv.index, layout, config=config, backend=name)
    assert torch.equal(whole.indices[:16], part.indices)
    assert torch.equal(whole.window_start[:16], part.window_start)


@every_backend
def test_bounds_find_every_needle(backend: str) -> None:
    """A single key that every sampled row points at is read, wherever it lies."""
    config = HiPConfig(budget=128, sliding_window=64, num_sink_tokens=16, dense_below=0)
    for place in range(20, 1900, 131):
        case = make_case(Shape((2048,), (64,), page_size=256, seed=place))
        needle = case.q[:, :2].mean(dim=(0, 1)) * 0 + 1.5
        case.q += needle
        case.ks[0][place] = needle * 4
        from hipserve.testing.cases import in_pages

        kv, layout = in_pages(case.ks, case.vs, case.shape)
        with using(backend) as name:
            selection = select_blocks(case.q, kv.index, layout, config=config, backend=name)
        found = (selection.indices == place // config.key_block_size).any(dim=2)
        assert bool(found.all()), place


@native
@pytest.mark.parametrize("channels", [2, 4])
def test_one_key_that_stands_out_in_a_few_channels_is_found(channels: int) -> None:
    """Among 65,536 keys, by a single row, as a step that copies a number asks for it.

    One of the 256 keys of a coarse run hardly changes their deviation: while coarse runs were
    ranked by that, a third of such keys were lost, and most needles in long texts with them.
    """
    generator = torch.Generator().manual_seed(0)
    page, pages, dim = 256, 256, 64
    k = torch.randn(pages, page, 1, dim, generator=generator)
    table = torch.arange(pages, dtype=torch.int32)[None]
    layout = BatchLayout.of(table, [page * pages], [1])
    for place in range(1000, 60_000, 5000):
        axes = torch.randperm(dim, generator=generator)[:channels]
        q = torch.randn(1, 2, dim, generator=generator) / 2
        q[..., axes] = 3
        planted = k.clone()
        planted[place // page, place % page, 0, axes] = 5
        index = build_index(planted.bfloat16())
        found = select_blocks(q.bfloat16(), index, layout, config=HiPConfig(decode_dense_below=0))
        assert place // 16 in found.indices[0, 0].tolist(), place


STATISTICS = {"middle": 0.823, "random": 0.782, "first": 0.698, "last": 0.710}


@pytest.mark.parametrize("representative", STATISTICS)
def test_one_split_keeps_the_maximum_as_often_as_theory_says(representative: str) -> None:
    """Random-walk scores: the share of splits whose better representative's half holds the best."""
    draws, length = 4000, 1024
    g = torch.Generator().manual_seed(7)
    walk = torch.randn(draws, length, generator=g).cumsum(1)
    kept = single_split(walk, representative)
    half = walk.argmax(1) // (length // 2)
    share = (kept == half).float().mean().item()
    assert abs(share - STATISTICS[representative]) < 0.03


def test_one_split_of_independent_scores_is_a_coin() -> None:
    scores = torch.randn(4000, 1024, generator=torch.Generator().manual_seed(8))
    share = (single_split(scores, "middle") == scores.argmax(1) // 512).float().mean().item()
    assert abs(share - 0.5) < 0.03


def single_split(scores: torch.Tensor, representative: str) -> torch.Tensor:
    """Which half the search's first decision prefers; keys are the scores, q is one."""
    draws, length = scores.shape
    k = scores.T[None, :, :, None].contiguous()
    config = HiPConfig(
        selector="tree",
        key_block_size=1,
        budget=1,
        num_sink_tokens=0,
        representative=representative,
        relative_scores=False,
    )
    keys = IndexedKeys(KeyIndex(k), torch.zeros(1).long())
    search = TreeSearch(
        SeenKeys(torch.ones(draws, 1, 1), keys), length, length, search_spec(config)
    )
    left = torch.tensor([[0, length // 2]]).expand(draws, 2)
    right = torch.tensor([[length // 2, length]]).expand(draws, 2)
    return search.block_scores(search.representative(left, right)).argmax(1)


def test_exact_branch_maxima_give_the_exact_best_blocks() -> None:
    """With true maxima as scores the beam search returns the top blocks (no luck involved)."""
    config = HiPConfig(
        selector="tree", key_block_size=2, budget=32, num_sink_tokens=0, relative_scores=False
    )
    k = torch.randn(1, 1024, 1, 1)
    keys = IndexedKeys(KeyIndex(k), torch.zeros(1).long())
    search = TreeSearch(SeenKeys(torch.ones(1, 1, 1), keys), 1024, 1024, search_spec(config))
    blocks = k.view(512, 2).amax(1)
    search.representative = lambda left, right: torch.stack([left, right], -1)
    search.block_scores = lambda ranges: torch.tensor(
        [[blocks[a:b].max().item() if a < b else -1e9 for a, b in ranges[0].tolist()]]
    )
    assert search.select()[0].tolist() == blocks.topk(16).indices.sort().values.tolist()


def test_sampled_rows_count_back_from_the_last() -> None:
    q = torch.arange(10.0)[:, None, None].expand(10, 2, 1)
    assert sample_rows(q, 1, 4)[0, :, 0].tolist() == [1, 1, 5, 5, 9, 9]
    assert sample_rows(q[:1], 1, 4)[0, :, 0].tolist() == [0, 0]


def test_relative_scores_let_a_row_of_small_norm_be_heard() -> None:
    """Two sampled rows want one block each; the loud one also likes its window best."""
    config = HiPConfig(
        selector="tree",
        budget=16,
        key_block_size=16,
        query_block_size=2,
        query_stride=1,
        num_sink_tokens=0,
        sliding_window=1,
        dense_below=0,
    )
    k = torch.zeros(1, 48, 1, 2)
    k[0, 5, 0, 1] = 1.0  # what the quiet row wants
    k[0, 20, 0, 0] = 1.0  # what the loud row wants a little
    k[0, 32:, 0, 0] = 5.0  # what the loud row reads anyway
    rows = torch.tensor([[[100.0, 0.0], [0.0, 1.0]]])
    keys = IndexedKeys(KeyIndex(k), torch.zeros(1).long())
    found = {
        relative: TreeSearch(SeenKeys(rows, keys), 32, 32, search_spec(changed)).select().tolist()
        for relative in (True, False)
        for changed in [config.replace(relative_scores=relative)]
    }
    assert found == {True: [[0]], False: [[1]]}


def test_scaling_q_keeps_the_selection() -> None:
    case = make_case(Shape((1200,), (200,)))
    config = HiPConfig(budget=64, sliding_window=16, num_sink_tokens=16, dense_below=0)
    one = select_blocks(case.q, case.index, case.layout, config=config, backend="reference")
    two = select_blocks(case.q * 4, case.index, case.layout, config=config, backend="reference")
    assert torch.equal(one.indices, two.indices)
