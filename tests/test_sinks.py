"""Learned sink logits against a float64 softmax with one more column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hipserve import ArgumentError, HiPConfig, hip_attention
from hipserve.attention import absorb_sinks
from hipserve.attention.dense import dense_head
from hipserve.ops import block_sparse_attention, select_blocks
from hipserve.testing import oracle
from hipserve.testing.cases import Case, Shape, make_case

CONFIG = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32, dense_below=0)
SINKS = (torch.tensor([-3.0, 0.0, 2.0, 9.0]), torch.full((4,), -torch.inf), torch.full((4,), 60.0))


def with_a_column(
    case: Case, masks: list[Tensor], sink_logits: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition: weights of a softmax over all keys and the sink, whose value is zero.

    out `[num_tokens, num_q_heads, head_dim]` and lse `[num_tokens, num_q_heads]`.
    """
    outs, lses, start, group = [], [], 0, case.shape.group_size
    for k, v, rows, mask in zip(case.ks, case.vs, case.shape.query_lens, masks, strict=True):
        q = case.q[start : start + rows].to(dtype).transpose(0, 1)
        start += rows
        kk, vv = (x.to(dtype).transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        scores = (q @ kk.mT * case.q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        column = sink_logits.to(dtype)[:, None, None].expand(-1, rows, 1)
        scores = torch.cat([scores, column], dim=-1)
        outs.append((scores.softmax(-1).nan_to_num(0.0)[..., :-1] @ vv).transpose(0, 1))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("sink_logits", SINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pruned", [True, False])
def test_sinks_are_a_column_of_the_softmax(
    pruned: bool, dtype: torch.dtype, sink_logits: Tensor
) -> None:
    case = make_case(Shape((500, 130, 1), (90, 1, 1), dtype=dtype))
    chosen = select_blocks(case.q, case.index, case.layout, config=CONFIG) if pruned else None
    masks = oracle.readable(case, chosen, CONFIG)
    out, lse = block_sparse_attention(case.q, case.pool, case.layout, chosen, config=CONFIG)
    out, lse = absorb_sinks(out, lse, sink_logits)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    truth, true_lse = with_a_column(case, masks, sink_logits, torch.float64)
    plain, plain_lse = with_a_column(case, masks, sink_logits, dtype)
    _, total = oracle.magnitudes(case, masks, 0.0)
    # Two roundings in the dtype of out: of attention itself, and with its share.
    oracle.assert_bounded(out, plain, truth, 2 * torch.finfo(dtype).eps * total, "out")
    oracle.assert_bounded(lse, plain_lse, true_lse, torch.finfo(dtype).eps * 4, "lse")


def test_rows_that_see_nothing_stay_zero() -> None:
    out, lse = torch.zeros(2, 4, 16), torch.full((2, 4), -torch.inf)
    sink_logits = torch.tensor([0.0, 5.0, -torch.inf, 1e4])
    got, total = absorb_sinks(out, lse, sink_logits)
    assert torch.equal(got, out)
    assert torch.equal(total, sink_logits.expand(2, 4))


def test_sinks_that_do_not_fit_are_refused() -> None:
    out, lse = torch.zeros(2, 4, 16), torch.zeros(2, 4)
    with pytest.raises(ArgumentError, match=r"sink_logits: expected shape \[4\], a logit a query"):
        absorb_sinks(out, lse, torch.zeros(2))
    with pytest.raises(ArgumentError, match=r"sink_logits: expected \[num_q_heads\]"):
        absorb_sinks(out, lse, torch.zeros(2, 4))
    with pytest.raises(ArgumentError, match=r"lse: expected shape \[2, 4\]"):
        absorb_sinks(out, torch.zeros(4, 2), torch.zeros(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's fastest kernels need a GPU")
@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 4, 128), (8, 1, 256)])
def test_torchs_dense_kernels_have_sinks(heads: tuple[int, int, int]) -> None:
    num_q_heads, num_kv_heads, head_dim = heads
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(2, 777, num_q_heads, head_dim, **half)
    k, v = torch.randn(2, 2, 777, num_kv_heads, head_dim, **half)
    sink_logits = torch.randn(num_q_heads, device="cuda") * 3
    scores = {"sm_scale": 0.1, "softcap": 0.0}
    got = dense_head(q, k, v, None, sink_logits=sink_logits, **scores)
    whole = {"causal": True, "return_lse": True, "backend": "reference", **scores}
    out, lse = hip_attention(q, k, v, config=HiPConfig(dense_below=1000), **whole)
    expected, _ = absorb_sinks(out, lse, sink_logits)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=0.03, rtol=0.02)
