"""What the host knows of a batch: its query blocks, what may be pruned, and what was read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends import every_backend, using
from hipserve import HiPConfig, hip_attention
from hipserve.attention import Account, SelectionReuse, layer
from hipserve.ops import build_index, select_blocks
from hipserve.ops.block_sparse_attention.reference import read_keys
from hipserve.plan import BatchLayout, bound_levels, kept_runs, pruning_rule, runs_of_pages
from hipserve.plan.rule import SINGLE_ROW
from hipserve.testing.cases import Pages, attend
from hipserve.types import KeyPool

CONFIG = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32, dense_below=0)
lengths = st.lists(st.integers(0, 400), min_size=1, max_size=4)


def table(batch: int) -> torch.Tensor:
    return torch.arange(batch, dtype=torch.int32)[:, None]


def make(seq_lens: list[int], draw: Any) -> BatchLayout:
    query_lens = [draw.draw(st.integers(0, n)) for n in seq_lens]
    return BatchLayout.of(table(len(seq_lens)), seq_lens, query_lens)


@given(seq_lens=lengths, data=st.data(), size=st.sampled_from([1, 7, 64]))
def test_numbers_and_tensors_make_the_same_blocks(
    seq_lens: list[int], data: Any, size: int
) -> None:
    known = make(seq_lens, data)
    read_back = BatchLayout(known.block_table, known.seq_lens, known.cu_seqlens_q)
    blocks = known.query_blocks(size)
    assert torch.equal(blocks, read_back.query_blocks(size))
    rows = [(position + i + 1) for _, _, n, position in blocks.tolist() for i in range(n)]
    assert known.keys_visible == sum(rows)
    assert read_back.keys_visible is None


@given(page_size=st.integers(1, 3000), size=st.sampled_from([1, 16, 64]), keys=st.integers(1, 9000))
def test_coarse_runs_hold_whole_fine_ones_and_enough_keys(
    page_size: int, size: int, keys: int
) -> None:
    levels = bound_levels(page_size, size)
    assert levels[0] == size
    for count, length in zip(kept_runs(keys, levels), levels, strict=True):
        assert length == size or (length <= page_size and length % size == 0)
        assert count * length >= keys
    of_pages = bound_levels(page_size, size, runs_of_pages(page_size, size))
    assert of_pages in (levels, levels[:1])
    if page_size % size == 0:  # pages of a sequence that has several
        assert all(page_size % length == 0 for length in of_pages)


@given(
    seq_lens=lengths,
    data=st.data(),
    size=st.sampled_from([1, 16, 64]),
    dense_below=st.sampled_from([0, 150, 300]),
    budget=st.sampled_from([16, 64, 128]),
)
def test_what_cannot_be_pruned_is_not(
    seq_lens: list[int], data: Any, size: int, dense_below: int, budget: int
) -> None:
    sizes = {"query_block_size": size, "query_stride": 1, "budget": budget}
    config = CONFIG.replace(dense_below=dense_below, **sizes)
    rule = pruning_rule(config, "cpu")
    layout = make(seq_lens, data)
    blocks = layout.query_blocks(size).tolist()
    starts = [rule.window_start(position, rows) for _, _, rows, position in blocks]
    pruned = any(start > config.num_sink_tokens for start in starts)
    assert layout.may_prune(rule) or not pruned
    if size == 1 and all(n > 0 for n in layout.cu_seqlens_q.diff().tolist()):
        assert layout.may_prune(rule) == pruned


def test_decode_steps_are_pruned_from_their_own_crossover_on() -> None:
    rule, end = pruning_rule(CONFIG.replace(dense_below=100), "cpu"), 100 * SINGLE_ROW
    for seq_len, query_len, expected in ((end, 1, False), (end + 1, 1, True), (end, 2, True)):
        layout = BatchLayout.of(table(2), [seq_len, 300], [query_len, 1])
        assert layout.may_prune(rule) is expected
        assert layout.may_prune(pruning_rule(CONFIG, "cpu"))


@every_backend
def test_short_sequences_are_never_searched(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(1, 90, 4, 64), *torch.randn(2, 1, 100, 2, 64)
    kv = Pages(KeyPool(k, v), build_index(k))
    known = BatchLayout.of(table(1), [100], [90])
    unknown = BatchLayout(known.block_table, known.seq_lens, known.cu_seqlens_q)
    with using(backend) as name:
        searched, _ = attend(q[0], kv, unknown, config=CONFIG, backend=name)
        monkeypatch.setattr(layer, "select_blocks", pytest.fail)
        assert torch.equal(attend(q[0], kv, known, config=CONFIG, backend=name)[0], searched)
        assert torch.equal(hip_attention(q, k, v, config=CONFIG, backend=name)[0], searched)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("share_group", [True, False])
def test_counts_are_those_of_the_keys_read(known: bool, share_group: bool) -> None:
    config = CONFIG.replace(share_group=share_group)
    k = torch.randn(2, 400, 2, 64)
    kv, q = Pages(KeyPool(k, k), build_index(k)), torch.randn(310, 4, 64)
    layout = BatchLayout.of(table(2), [400, 90], [300, 10])
    if not known:
        layout = BatchLayout(layout.block_table, layout.seq_lens, layout.cu_seqlens_q)
    selection, account = select_blocks(q, kv.index, layout, config=config), Account()
    attend(q, kv, layout, config, account=account)
    read = 0.0
    blocks = layout.query_blocks(config.query_block_size).tolist()
    for i, (_, _, rows, position) in enumerate(blocks):
        start, last = int(selection.window_start[i]), position + rows
        keys = read_keys(selection.indices[i], config.key_block_size, 16, start, last)
        for p in range(position, last):
            read += ((keys >= 0) & (keys <= p)).double().sum(1).mean().item()
    assert account.keys_read == pytest.approx(read)
    assert 0 < read < account.keys_visible


def test_counting_later_counts_the_same() -> None:
    """Steps that select, reuse a selection or read everything, and another budget on the way."""
    k = torch.randn(1, 400, 2, 64)
    kv, reuse = Pages(KeyPool(k, k), build_index(k)), SelectionReuse()
    account = Account()
    read = visible = 0.0
    for end in [*range(90, 100), *range(200, 300)]:
        config = CONFIG.replace(refresh_interval=3, budget=64 if end < 250 else 96)
        layout = BatchLayout.of(table(1), [end], [1])
        attend(torch.randn(1, 4, 64), kv, layout, config, reuse, account)
        if reuse.selection is None:
            counts: tuple[Any, Any] = (end, end)
        else:
            counts = reuse.selection.keys_read(layout, config)
        read, visible = read + float(counts[0]), visible + float(counts[1])
    assert account.keys_read == pytest.approx(read)
    assert account.keys_visible == visible == sum([*range(90, 100), *range(200, 300)])
