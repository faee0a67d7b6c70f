"""Runs longer than a page: what they hold, and searches that begin with them.

Fine runs of one key make everything short: coarse ones have 8, long ones 256 and 4,096, and a
search leaves long ones out where it has more than 128.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import every_backend, native, using
from hipserve import ArgumentError, HiPConfig
from hipserve.cache import PagedLayer
from hipserve.config import IndexForm
from hipserve.ops import build_index, join_runs, select_blocks
from hipserve.ops.write_kv.layout import IndexLayout
from hipserve.plan import BatchLayout, bound_levels, bound_offsets, runs_of_pages
from hipserve.plan.runs import BOX_RADIUS, LONG_KEEP, kept_runs, pruning_levels
from hipserve.testing.cases import Case, Pages, Shape, in_pages, make_case, make_rope
from hipserve.testing.laws import assert_lawful
from hipserve.types import KeyIndex

DEEP = HiPConfig(
    budget=32,
    key_block_size=1,
    bound_block_size=1,
    rerank=2,
    query_stride=4,
    num_sink_tokens=5,
    sliding_window=33,
    dense_below=0,
    decode_dense_below=0,
)
LENGTHS = (1, 8, 256, 4096)
SHAPE = Shape((32_768,), (1,), head_dim=16, page_size=16, group_size=2, kind="grid")


def deep_case(shape: Shape, config: HiPConfig = DEEP) -> Case:
    return make_case(shape, config.index_form, backend="auto")


def indices(
    case: Case, config: HiPConfig, backend: str, index: KeyIndex | None = None
) -> torch.Tensor:
    searched = index or case.index
    return select_blocks(case.q, searched, case.layout, config=config, backend=backend).indices


@given(page_size=st.integers(16, 600), size=st.sampled_from([1, 2, 16]), keys=st.integers(0, 2**31))
def test_levels_follow_from_the_longest_sequence(page_size: int, size: int, keys: int) -> None:
    num_runs = runs_of_pages(page_size, size, keys)
    levels = bound_levels(page_size, size, num_runs)
    assert bound_offsets(page_size, size, num_runs)[-1] == num_runs
    assert all(long % short == 0 for short, long in itertools.pairwise(levels))
    assert len(levels) < 3 or LONG_KEEP * levels[-1] < keys
    if len(levels) > 1:
        assert LONG_KEEP * max(levels[-1], size * 16) * 16 >= keys


def test_levels_of_pages_of_256_keys() -> None:
    depth = {2**19: 2, 2**19 + 1: 3, 2**23: 3, 2**23 + 1: 4, 2**31: 5}
    for keys, levels in depth.items():
        runs = runs_of_pages(256, 16, keys)
        lengths = (16, 128, 4096, 65_536, 2**20)[:levels]
        assert bound_levels(256, 16, runs) == lengths
    lengths = (16, 128, 4096, 65_536)
    depth = {2**19 - 4097: 2, 2**19 - 4096: 3, 2**23 - 65_537: 3, 2**23 - 65_536: 4}
    for keys, levels in depth.items():
        assert len(pruning_levels(lengths, kept_runs(4096, lengths), keys)) == levels


@every_backend
@pytest.mark.parametrize("code_bits", [16, 8, 4])
@pytest.mark.parametrize("rows", [1, 70])
def test_every_backend_begins_with_the_same_long_runs(
    backend: str, code_bits: int, rows: int
) -> None:
    lengths = (36_011, 31, 81_233)
    shape = replace(SHAPE, seq_lens=lengths, query_lens=(rows, 1, rows), dtype=torch.bfloat16)
    config = DEEP.replace(code_bits=code_bits)
    case = deep_case(shape, config)
    assert bound_levels(16, 1, case.index.num_runs) == LENGTHS[:3]
    expected = indices(case, config, "reference")
    with using(backend) as name:
        assert torch.equal(indices(case, config, name), expected)
        selection = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
    assert_lawful(selection, case, config)


@every_backend
def test_two_levels_of_long_runs(backend: str) -> None:
    case = deep_case(replace(SHAPE, seq_lens=(540_017,), num_kv_heads=1))
    assert bound_levels(16, 1, case.index.num_runs) == LENGTHS
    with using(backend) as name:
        assert torch.equal(indices(case, DEEP, name), indices(case, DEEP, "reference"))


@every_backend
@pytest.mark.parametrize(("trained", "levels"), [(512, 2), (1024, 3)])
def test_long_runs_beyond_the_trained_length_lie_in_one_segment(
    backend: str, trained: int, levels: int
) -> None:
    """Segments of 128 keys have none, those of 256 do."""
    config = DEEP.replace(extend="stream", trained_length=trained)
    case = deep_case(replace(SHAPE, seq_lens=(45_013,), kind="normal"), config)
    with using(backend) as name:
        found, expected, shallow = (
            select_blocks(
                case.q, index, case.layout, config=config, rope=make_rope(16), backend=chosen
            ).indices
            for index, chosen in (
                (case.index, name),
                (case.index, "reference"),
                (replace(case.index, summaries=case.index.summaries[:, :18]), "reference"),
            )
        )
    assert torch.equal(found, expected)
    assert torch.equal(expected, shallow) == (levels == 2)


@every_backend
@pytest.mark.parametrize("length", [255, 4_000, 32_768])
def test_a_search_that_keeps_every_long_run_chooses_as_without_them(
    backend: str, length: int
) -> None:
    case = deep_case(replace(SHAPE, seq_lens=(length, 32_900), query_lens=(1, 1)))
    assert len(bound_levels(16, 1, case.index.num_runs)) == 3
    short = BatchLayout.of(case.layout.block_table[:1], [length], [1])
    case = replace(case, layout=short, q=case.q[:1])
    shallow = replace(case.index, summaries=case.index.summaries[:, :18])
    with using(backend) as name:
        assert torch.equal(indices(case, DEEP, name), indices(case, DEEP, name, shallow))


@every_backend
def test_a_single_key_is_found_at_any_depth(backend: str) -> None:
    shape = replace(SHAPE, seq_lens=(540_000,), num_kv_heads=1, kind="normal")
    case = deep_case(shape)
    for place in (6, 4095, 4096, 123_456, 536_576 - 1, 539_900):
        ks = [case.ks[0].clone()]
        ks[0][place] = case.q[0].mean(0) * 20
        kv, layout = in_pages(ks, case.vs, shape, DEEP.index_form, "auto")
        with using(backend) as name:
            found = select_blocks(case.q, kv.index, layout, config=DEEP, backend=name).indices
        assert bool((found == place).any()), place


@native
def test_pages_and_rows_may_lie_anywhere() -> None:
    """Page permutation, chunks, and one page for all: the same blocks, bit for bit."""
    shape = replace(SHAPE, seq_lens=(50_000,), query_lens=(200,))
    case = deep_case(shape)
    expected = indices(case, DEEP, "cpu")
    kv, layout = in_pages(case.ks, case.vs, shape, DEEP.index_form, "auto", page_seed=7)
    assert torch.equal(indices(replace(case, kv=kv, layout=layout), DEEP, "cpu"), expected)
    whole = build_index(case.ks[0][None], **DEEP.index_form._asdict())
    whole.summaries.copy_((whole.summaries * 16).round() / 16)  # as those of the case
    table = torch.zeros(1, 1, dtype=torch.int32)
    join_runs(whole, table, [50_000])
    case = replace(case, layout=BatchLayout.of(table, [50_000], [200]))
    assert torch.equal(indices(case, DEEP, "cpu", whole), expected)


@native
def test_a_budget_of_everything_reads_everything() -> None:
    case = deep_case(replace(SHAPE, seq_lens=(34_000,)))
    config = DEEP.replace(budget=34_000)
    selection = select_blocks(case.q, case.index, case.layout, config=config)
    assert int(selection.keys_read(case.layout, config)[0]) == 34_000


def box_of(layer: PagedLayer, seq: int, run: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of a long run, as its page has it, in float64."""
    sizes = (layer.page_size, 1, layer.index.num_runs)
    entry = bound_offsets(*sizes)[bound_levels(*sizes).index(length)]
    page = layer.block_table[seq, (run + 1) * length // layer.page_size - 1]
    sides = layer.index.summaries[page, entry].double()
    if layer.index.summary_scales is not None:
        sides *= layer.index.summary_scales[page, entry, ..., None].double()
    center, radius = sides[:, 0], sides[:, 1] / BOX_RADIUS
    return center - radius, center + radius


def assert_joined(layer: PagedLayer, seq: int, keys: torch.Tensor, tolerance: float) -> None:
    """Every complete long run is the box of its keys `[seq_len, heads, head_dim]`."""
    levels = bound_levels(layer.page_size, 1, layer.index.num_runs)
    assert len(levels) > 2
    for length in levels[2:]:
        for run, inside in enumerate(keys.double().split(length)):
            if len(inside) == length:
                low, high = box_of(layer, seq, run, length)
                torch.testing.assert_close(low, inside.amin(0), rtol=0, atol=tolerance)
                torch.testing.assert_close(high, inside.amax(0), rtol=0, atol=tolerance)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), code_bits=st.sampled_from([16, 8]))
def test_appending_truncating_and_branching_keep_long_runs_right(seed: int, code_bits: int) -> None:
    """An index gets its long runs when the pages have room for so many keys, from the first key."""
    rng = random.Random(seed)
    layer = PagedLayer(page_size=16, run_size=1, code_bits=code_bits)
    truth = [torch.empty(0, 1, 16)] * rng.randint(1, 2)
    tolerance = 1e-5 if code_bits == 16 else 3 * 0.05  # two roundings to codes of 8 bits
    for turn in range(12):
        new = rng.choice([1, 255, 256, 257, 700]) if turn else 32_600
        k = torch.randn(len(truth), new, 1, 16)
        layer.append(k, k)
        truth = [torch.cat([t, row]) for t, row in zip(truth, k, strict=True)]
        if rng.random() < 0.4:
            order = torch.tensor([rng.randrange(len(truth)) for _ in range(rng.randint(1, 3))])
            layer.reorder(order)
            truth = [truth[i] for i in order.tolist()]
        if rng.random() < 0.4:
            count = rng.choice([1, 17, 256, 600])
            layer.truncate(count)
            truth = [t[: len(t) - count] for t in truth]
    k = torch.randn(len(truth), 600, 1, 16)
    layer.append(k, k)
    for seq, row in enumerate(k):
        assert_joined(layer, seq, torch.cat([truth[seq], row]), tolerance)


def test_step_by_step_equals_one_pass() -> None:
    k = torch.randn(1, 40_000, 1, 16, dtype=torch.bfloat16)
    whole, steps = (PagedLayer(page_size=16, run_size=1) for _ in range(2))
    whole.append(k, k)
    for part in (k[:, :32_600], *k[:, 32_600:33_400].split(1, dim=1), k[:, 33_400:]):
        steps.append(part, part)
    q = torch.randn(1, 2, 16, dtype=torch.bfloat16)
    chosen = [
        select_blocks(q, layer.index, layer.layout([1]), config=DEEP) for layer in (whole, steps)
    ]
    assert torch.equal(chosen[0].indices, chosen[1].indices)


def test_shared_pages_share_long_runs() -> None:
    """A branch joins its own runs, and leaves those of the pages that it shares."""
    layer = PagedLayer(page_size=16, run_size=1)
    k = torch.randn(1, 33_024, 1, 16)
    layer.append(k, k)
    before = [x.clone() for x in box_of(layer, 0, 128, 256)]
    layer.reorder(torch.tensor([0, 0]))
    new = torch.randn(2, 256, 1, 16)
    layer.append(new, new)
    assert layer.index.codes.shape[0] < 2 * 33_280 // 16  # pages were shared
    for seq in range(2):
        assert torch.equal(box_of(layer, seq, 128, 256)[0], before[0])
        high = box_of(layer, seq, 129, 256)[1]
        torch.testing.assert_close(high, new[seq].double().amax(0), rtol=0, atol=1e-5)


def test_short_pools_hold_no_long_runs() -> None:
    layer = PagedLayer(page_size=256)
    k = torch.randn(1, 100_000, 1, 16)
    layer.append(k, k)
    assert layer.index.num_runs == 18


def test_joins_that_cannot_be() -> None:
    form, size = IndexForm(run_size=1), 16
    k = torch.randn(4, size, 1, 16)
    index = IndexLayout.of_pages(size, 16, k.dtype, form, 2**20).empty_like(k)
    pages = Pages(None, index)  # type: ignore[arg-type]
    table = torch.arange(4, dtype=torch.int32)[None]
    with pytest.raises(ArgumentError, match=r"seq_lens: expected at most 64"):
        join_runs(pages.index, table, [65])
    with pytest.raises(ArgumentError, match=r"known: expected 1 lengths"):
        join_runs(pages.index, table, [64], [0, 0])
    with pytest.raises(ArgumentError, match=r"block_table: expected dtype int32"):
        join_runs(pages.index, table.long(), [64])
