"""The Triton kernels beyond the trained length, as `test_kernels.py` runs the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hipserve import BackendError, HiPConfig
from hipserve.ops import block_sparse_attention, select_blocks
from hipserve.ops.block_sparse_attention.triton import turned
from hipserve.platform import interpreting
from hipserve.testing.cases import Case, Shape, make_case, make_rope
from hipserve.types import BlockSelection

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not (GPU or interpreting()), reason="no GPU and no interpreter")
DEVICE = "cuda" if GPU else "cpu"
STREAM = HiPConfig(
    budget=64,
    num_sink_tokens=16,
    sliding_window=32,
    query_block_size=16,
    dense_below=0,
    extend="stream",
    trained_length=256,
)
SHAPES = {
    "prefill": Shape((700, 200), (20, 17), group_size=3, head_dim=80),
    "decode": Shape((1300, 250, 300), (1, 1, 1), group_size=2, page_size=256),
}


def partial_rope(head_dim: int, neighbours: bool = False) -> Tensor:
    """`[2, head_dim]`: three quarters of the channels turn."""
    return make_rope(head_dim, head_dim * 3 // 8, neighbours=neighbours)


def case_of(shape: str, config: HiPConfig) -> Case:
    return make_case(SHAPES[shape], config.index_form)


@pytest.mark.parametrize("trained", [512, 1024])
def test_long_runs_lie_in_one_segment(trained: int) -> None:
    """Segments of 128 keys have none of 256, segments of 256 do."""
    config = STREAM.replace(trained_length=trained, key_block_size=1, bound_block_size=1)
    shape = Shape((45_013,), (1,), 1, head_dim=16, page_size=16)
    case, rope = make_case(shape, config.index_form, backend="auto"), make_rope(16)
    there, options = case.on(DEVICE), {"config": config, "rope": rope.to(DEVICE)}
    got = select_blocks(there.q, there.index, there.layout, backend="triton", **options)
    options["rope"] = rope
    expected = select_blocks(case.q, case.index, case.layout, backend="reference", **options)
    assert torch.equal(got.indices.cpu(), expected.indices)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"selector": "tree"}, {"share_group": False, "query_stride": 1}, {"rerank": 0}],
    ids=str,
)
def test_searches_see_far_keys_as_defined(shape: str, changes: dict[str, Any]) -> None:
    config = STREAM.replace(**changes)
    case, rope = case_of(shape, config), partial_rope(SHAPES[shape].head_dim)
    there = case.on(DEVICE)
    options: dict[str, Any] = {"config": config, "rope": rope.to(DEVICE)}
    got = select_blocks(there.q, there.index, there.layout, backend="triton", **options)
    options["rope"] = rope
    expected = select_blocks(case.q, case.index, case.layout, backend="reference", **options)
    assert torch.equal(got.indices.cpu(), expected.indices)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_sees_its_keys_as_defined(shape: str, neighbours: bool) -> None:
    case, rope = case_of(shape, STREAM), partial_rope(SHAPES[shape].head_dim, neighbours)
    options: dict[str, Any] = {"config": STREAM, "rope": rope}
    chosen = select_blocks(case.q, case.index, case.layout, backend="reference", **options)
    expected, _ = block_sparse_attention(
        case.q, case.pool, case.layout, chosen, backend="reference", **options
    )
    there = case.on(DEVICE)
    selection = BlockSelection(chosen.indices.to(DEVICE), chosen.window_start.to(DEVICE))
    options["rope"] = rope.to(DEVICE)
    got, _ = block_sparse_attention(
        there.q, there.pool, there.layout, selection, backend="triton", **options
    )
    plain, _ = block_sparse_attention(
        there.q,
        there.pool,
        there.layout,
        selection,
        config=STREAM.replace(extend="none"),
        backend="triton",
    )
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-6)
    beyond = torch.zeros(len(got), dtype=torch.bool)
    for _, row, rows, position in case.layout.query_blocks(16).tolist():
        beyond[row : row + rows] = position >= 256
    # Compiled for a card these are two kernels; what computes rows within the trained length alone
    # is the one without turned rows (`AttentionLayer`).
    rounding = 2e-6 if DEVICE == "cuda" else 0
    torch.testing.assert_close(got[~beyond], plain[~beyond], rtol=0, atol=rounding)
    assert not torch.allclose(got[beyond], plain[beyond], atol=1e-3)


def test_whole_query_blocks_see_their_keys_as_defined() -> None:
    """In float16 and with 64 rows a block, as the kernel for Hopper takes them, a few of them at a
    time: chosen blocks, sinks and window, within the trained length and beyond."""
    config = STREAM.replace(query_block_size=64, num_sink_tokens=64, budget=128, trained_length=600)
    shape = Shape((900, 70), (700, 70), 2, group_size=4, head_dim=64, dtype=torch.float16)
    case, rope = make_case(shape, config.index_form), make_rope(64)
    options: dict[str, Any] = {"config": config, "rope": rope}
    chosen = select_blocks(case.q, case.index, case.layout, backend="reference", **options)
    expected, lse = block_sparse_attention(
        case.q, case.pool, case.layout, chosen, backend="reference", **options
    )
    there = case.on(DEVICE)
    selection = BlockSelection(chosen.indices.to(DEVICE), chosen.window_start.to(DEVICE))
    options["rope"] = rope.to(DEVICE)
    got, got_lse = block_sparse_attention(
        there.q, there.pool, there.layout, selection, backend="triton", **options
    )
    torch.testing.assert_close(got.cpu(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(got_lse.cpu(), lse, rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_turned_keys_of_some_query_blocks_at_a_time(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept at a time changes nothing, nor which rows are split."""
    case, rope = case_of(shape, STREAM), partial_rope(SHAPES[shape].head_dim)
    options: dict[str, Any] = {"config": STREAM, "rope": rope}
    chosen = select_blocks(case.q, case.index, case.layout, backend="reference", **options)
    chosen = BlockSelection(chosen.indices.to(DEVICE), chosen.window_start.to(DEVICE))
    there = case.on(DEVICE)
    options = {"config": STREAM, "rope": rope.to(DEVICE), "backend": "triton"}
    results: list[Tensor] = []
    for size in (turned.ROOM_BYTES, 1):
        monkeypatch.setattr(turned, "ROOM_BYTES", size)
        results += block_sparse_attention(there.q, there.pool, there.layout, chosen, **options)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_codes_are_refused() -> None:
    config = STREAM.replace(code_bits=4)
    case = make_case(replace(SHAPES["decode"], head_dim=64), config.index_form).on(DEVICE)
    options: dict[str, Any] = {"config": config, "rope": partial_rope(64).to(DEVICE)}
    with pytest.raises(BackendError, match="code_bits=16"):
        select_blocks(case.q, case.index, case.layout, backend="triton", **options)
