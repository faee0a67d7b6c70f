"""Rows that read everything, by torch's own dense kernels where those are the fastest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hipserve.attention.crossover import dense_kernel
from hipserve.attention.sinks import absorb_sinks
from hipserve.attention.torch_dense import Rows, attend_rows
from hipserve.config import DEFAULT, HiPConfig
from hipserve.ops import block_sparse_attention
from hipserve.plan import BatchLayout, PruningRule, dense_rows
from hipserve.types import BlockSelection, KeyPool

KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]

FEWEST_ROWS = 32
"""Minimum rows of a sequence for which torch's kernel pays; fewer wait for memory."""


def dense_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: PruningRule | None,
    *,
    sm_scale: float | None,
    softcap: float,
    sink_logits: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The output of the first rows of whole sequences on a GPU: those that read everything.

    By cuDNN or FlashAttention, where these are able and the fastest: in 16 bits, without a softcap,
    and if the sequences begin in this call. On a CPU, `attend_chosen` finds such rows.

    Args:
        q: `[batch, query_len, num_q_heads, head_dim]`.
        k, v: `[batch, kv_len, num_kv_heads, head_dim]`.
        rule: as in `dense_rows`.
        sm_scale, softcap: as in `hip_attention`.
        sink_logits: `[num_q_heads]`, as in `absorb_sinks`.

    Returns:
        `[batch, rows, num_q_heads, head_dim]`; 0 rows where those kernels are not able.
    """
    if not _gpu_takes(q, softcap, backend) or k.shape[1] != q.shape[1]:
        return q[:, :0]
    rows = dense_rows(rule, q.shape[1])
    q, k, v = (x[:, :rows].transpose(1, 2) for x in (q, k, v))
    if sink_logits is not None:
        return _head_with_sinks(q, k, v, sm_scale, sink_logits)
    gqa, sdpa = q.shape[1] != k.shape[1], F.scaled_dot_product_attention
    with sdpa_kernel(KERNELS, set_priority=True):
        return sdpa(q, k, v, is_causal=True, scale=sm_scale, enable_gqa=gqa).transpose(1, 2)


def _gpu_takes(q: Tensor, softcap: float, backend: str) -> bool:
    """Torch's dense kernels for GPUs are able to compute these rows, and the fastest."""
    if not q.is_cuda or backend != "auto" or softcap or torch.compiler.is_compiling():
        return False
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256


def _cpu_takes(q: Tensor, num_kv_heads: int, softcap: float, backend: str) -> bool:
    """The same of torch's dense kernel for CPUs; few rows wait for memory with either kernel."""
    if q.device.type != "cpu" or backend != "auto" or softcap or q.shape[0] < FEWEST_ROWS:
        return False
    group_size = q.shape[-2] // num_kv_heads
    compiling = torch.compiler.is_compiling()
    return not compiling and dense_kernel("cpu", q.dtype, q.shape[-1], group_size) == "sdpa"


def attend_chosen(
    q: Tensor,
    pool: KeyPool,
    layout: BatchLayout,
    selection: BlockSelection | None,
    *,
    config: HiPConfig | None = None,
    sliding_window: int = 0,
    sm_scale: float | None = None,
    softcap: float = 0.0,
    rope: Tensor | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention`, in which the fastest dense kernel takes rows that read everything.

    On a CPU whose fastest kernel is torch's, these are the leading rows of a sequence in this call,
    whole prompts and later chunks. Nothing is checked.

    Args:
        q: `[num_tokens, num_q_heads, head_dim]`, packed over the sequences.
        rope: `[2, head_dim]`, as there, like the others.

    Returns:
        out like q, and lse `[num_tokens, num_q_heads]`, as there.
    """
    config = config or DEFAULT
    readable = pool.places is None and pool.lists is None and pool.k_cache.dtype == q.dtype
    if readable and not sliding_window and _cpu_takes(q, pool.num_kv_heads, softcap, backend):
        shares = _divide(layout, selection, config)
        if shares.spans:
            options: dict[str, Any] = {"config": config, "sm_scale": sm_scale, "rope": rope}
            return _by_both(q, pool, layout, selection, shares, **options)
    return block_sparse_attention(
        q,
        pool,
        layout,
        selection,
        config=config,
        sliding_window=sliding_window,
        sm_scale=sm_scale,
        softcap=softcap,
        rope=rope,
        backend=backend,
        out=out,
        check=False,
    )


class _Shares(NamedTuple):
    """What torch's kernel reads, and what ours does.

    Attributes:
        spans: rows that follow each other in query blocks that read everything, enough to pay.
        others: `[n]` int64, the other query blocks.
    """

    spans: list[Rows]
    others: Tensor


def _divide(layout: BatchLayout, selection: BlockSelection | None, config: HiPConfig) -> _Shares:
    """Which kernel takes which rows."""
    blocks: list[list[int]] = layout.query_blocks(config.query_block_size).tolist()
    starts = selection.window_start.tolist() if selection else [0] * len(blocks)
    spans: list[list[int]] = []  # query blocks that follow each other
    for i, (seq, row, _, _) in enumerate(blocks):
        if starts[i] > config.num_sink_tokens:
            continue
        before = blocks[spans[-1][-1]] if spans else [-1, 0, 0, 0]
        if before[0] == seq and before[1] + before[2] == row:
            spans[-1].append(i)
        else:
            spans.append([i])
    rows = [(_joined(blocks[span[0]], blocks[span[-1]]), span) for span in spans]
    taken = [(r, span) for r, span in rows if r.end - r.begin >= FEWEST_ROWS]
    mine = {i for _, span in taken for i in span}
    others = torch.tensor([i for i in range(len(blocks)) if i not in mine], dtype=torch.int64)
    return _Shares([r for r, _ in taken], others)


def _by_both(
    q: Tensor,
    pool: KeyPool,
    layout: BatchLayout,
    selection: BlockSelection | None,
    shares: _Shares,
    *,
    config: HiPConfig,
    sm_scale: float | None,
    rope: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Torch's kernel for some rows, ours for the other query blocks."""
    if len(shares.others):
        rest = layout.only(config.query_block_size, shares.others)
        chosen = None if selection is None else selection.rows(shares.others)
        options: dict[str, Any] = {"config": config, "sm_scale": sm_scale, "rope": rope}
        out, lse = block_sparse_attention(q, pool, rest, chosen, check=False, **options)
    else:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    with torch.no_grad():
        for span in shares.spans:
            rows, pages = slice(span.begin, span.end), layout.block_table[span.seq]
            for heads, part, part_lse in attend_rows(q[rows], pool, pages, span.position, scale):
                if part.shape == out.shape and part.dtype == out.dtype:  # all rows and heads
                    return part, part_lse
                out[rows, heads], lse[rows, heads] = part, part_lse
    return out, lse


def _joined(first: list[int], last: list[int]) -> Rows:
    """The rows from one query block to another."""
    return Rows(first[0], first[1], last[1] + last[2], first[3])


def _head_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None, sink_logits: Tensor
) -> Tensor:
    """q, k and v `[batch, heads, rows, head_dim]`: sinks need the log-sum-exp, which torch returns
    from the operator behind its FlashAttention only, for a head_dim in steps of 8."""
    if q.shape[-1] % 8:
        return q[:, :, :0].transpose(1, 2)
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = operator(q, k, v, 0.0, is_causal=True, scale=sm_scale)[:2]
    return absorb_sinks(out.transpose(1, 2), lse.transpose(1, 2), sink_logits, check=False)[0]
