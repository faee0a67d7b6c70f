"""Pages of growing, branching and shrinking sequences hold what a plain list would hold."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hipserve import HiPConfig
from hipserve.cache import PagedLayer
from hipserve.ops import select_blocks
from hipserve.plan import bound_levels


def held(layer: PagedLayer, seq: int) -> torch.Tensor:
    layout = layer.layout([1] * len(layer.lengths))
    positions = torch.arange(layer.lengths[seq])
    pages = layout.block_table[seq, positions // layer.page_size].long()
    return layer.pool.k_cache[pages, positions % layer.page_size]


@given(seed=st.integers(0, 2**31 - 1))
def test_branches_never_see_each_other(seed: int) -> None:
    rng = random.Random(seed)
    layer, batch = PagedLayer(page_size=rng.choice([16, 64])), rng.randint(1, 3)
    truth = [torch.empty(0, 1, 16) for _ in range(batch)]
    for _ in range(15):
        action = rng.random()
        if action < 0.6:
            new = rng.choice([1, 1, 1, 7, 40])
            k = torch.randn(len(truth), new, 1, 16)
            valid = torch.rand(len(truth), new) < 0.7 if rng.random() < 0.3 else None
            layer.append(k, k, valid)
            truth = [
                torch.cat([t, row if valid is None else row[valid[i]]])
                for i, (t, row) in enumerate(zip(truth, k, strict=True))
            ]
        elif action < 0.85 and layer.lengths:
            order = torch.tensor([rng.randrange(len(truth)) for _ in range(rng.randint(1, 4))])
            layer.reorder(order)
            truth = [truth[i] for i in order.tolist()]
        elif layer.lengths:
            count = rng.randint(0, 20)
            layer.truncate(count)
            truth = [t[: max(len(t) - count, 0)] for t in truth]
    for seq, keys in enumerate(truth if layer.lengths else []):
        assert torch.equal(held(layer, seq), keys)
        assert_summarized(layer, seq, keys)


def assert_summarized(layer: PagedLayer, seq: int, keys: torch.Tensor) -> None:
    """Every whole run has mean and deviation of its keys, every longer one middle and a quarter of
    the width of their box.

    One whose end was truncated is not searched until it is written again.
    """
    table = layer.layout([1] * len(layer.lengths)).block_table[seq]
    offset = 0
    for level, length in enumerate(bound_levels(layer.page_size, 16)):
        for run, inside in enumerate(keys.split(length)):
            if len(inside) < length:
                continue
            page, slot = divmod(run * length, layer.page_size)
            center, radius = layer.index.summaries[table[page], offset + slot // length].unbind(1)
            low, high = inside.aminmax(dim=0)
            expected = (inside.mean(0), inside.std(0, unbiased=False))
            expected = expected if level == 0 else ((low + high) / 2, (high - low) / 4)
            torch.testing.assert_close((center, radius), expected)
        offset += -(-layer.page_size // length)


def test_a_branch_copies_one_page() -> None:
    layer = PagedLayer(page_size=16)
    k = torch.randn(1, 100, 1, 16)
    layer.append(k, k)
    layer.reorder(torch.tensor([0, 0]))
    new = torch.randn(2, 1, 1, 16)
    layer.append(new, new)
    table = layer.layout([1, 1]).block_table
    assert torch.equal(table[0, :6], table[1, :6])
    assert table[0, 6] != table[1, 6]


def test_pages_made_in_inference_mode_can_be_written_later() -> None:
    layer = PagedLayer()
    with torch.inference_mode():
        k = torch.randn(1, 300, 1, 16)
        layer.append(k, k)
        layer.reorder(torch.tensor([0, 0]))
    new = torch.randn(2, 900, 1, 16)
    layer.append(new, new)
    assert torch.equal(held(layer, 1), torch.cat([k[0], new[1]]))


def test_growth_is_rare_and_accounted() -> None:
    layer, pointers = PagedLayer(), set()
    for _ in range(300):
        k = torch.randn(1, 50, 1, 16)
        layer.append(k, k)
        pointers.add(layer.pool.k_cache.data_ptr())
    assert len(pointers) <= 6
    expected = layer.pool.k_cache.nbytes * 2 + layer.index.summaries.nbytes
    assert layer.nbytes == expected


@pytest.mark.parametrize("code_bits", [4, 8, 16])
def test_checks_of_operations_accept_its_pages(code_bits: int) -> None:
    config = HiPConfig(budget=64, code_bits=code_bits, sliding_window=64, decode_dense_below=0)
    layer = PagedLayer(256, *config.index_form)
    k = torch.randn(1, 700, 2, 64)
    layer.append(k, k)
    q = torch.randn(1, 4, 64)
    selection = select_blocks(q, layer.index, layer.layout([1]), config=config)
    assert (selection.indices >= 0).sum(2).tolist() == [[4, 4]]
