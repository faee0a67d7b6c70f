"""Rows that read everything, by torch's own dense kernels where those are the fastest."""

from __future__ import annotations

from typing import Any

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
"""Rows of a sequence from which reading its keys for torch's kernel pays; fewer wait for memory."""


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
    """The output of the first rows of whole sequences: those that read everything.

    `[batch, rows, num_q_heads, head_dim]` by cuDNN or FlashAttention on a GPU and by SDPA on a CPU;
    no rows where those are not the fastest or not able: in 32 bits on a GPU, with a softcap, with
    sinks on a CPU, or behind keys that are there already. q, k and v as in `hip_attention`,
    `rule` as in `dense_rows`, `sink_logits` as in `absorb_sinks`.
    """
    able = k.shape[1] == q.shape[1] and (q.is_cuda or sink_logits is None)
    if not able or not _takes_torch(q, k.shape[2], softcap, backend):
        return q[:, :0]
    rows = dense_rows(rule, q.shape[1])
    q, k, v = (x[:, :rows].transpose(1, 2) for x in (q, k, v))
    if sink_logits is not None:
        return _head_with_sinks(q, k, v, sm_scale, sink_logits)
    gqa, sdpa = q.shape[1] != k.shape[1], F.scaled_dot_product_attention
    if not q.is_cuda:
        return sdpa(q, k, v, is_causal=True, scale=sm_scale, enable_gqa=gqa).transpose(1, 2)
    with sdpa_kernel(KERNELS, set_priority=True):
        return sdpa(q, k, v, is_causal=True, scale=sm_scale, enable_gqa=gqa).transpose(1, 2)


def _takes_torch(q: Tensor, num_kv_heads: int, softcap: float, backend: str) -> bool:
    """Torch's dense kernels are able to compute these rows, and the fastest."""
    if backend != "auto" or softcap or torch.compiler.is_compiling():
        return False
    if q.is_cuda:
        return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256
    kernel = dense_kernel(q.device.type, q.dtype, q.shape[-1], q.shape[-2] // num_kv_heads)
    return kernel == "sdpa"


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention`, in which the fastest dense kernel takes rows that read everything.

    Shapes, arguments and results as there; nothing is checked. On a CPU whose fastest kernel is
    torch's, these are the leading rows of a sequence in this call, whole prompts and later chunks.
    """
    config = config or DEFAULT
    options = {"sm_scale": sm_scale, "softcap": softcap, "backend": backend}
    many = q.device.type == "cpu" and q.shape[0] >= FEWEST_ROWS and not sliding_window
    able = many and _takes_torch(q, pool.num_kv_heads, softcap, backend)
    spans, rest = _dense_spans(layout, selection, config) if able else ([], q[:0])
    if not spans:
        options = {**options, "sliding_window": sliding_window, "config": config, "check": False}
        return block_sparse_attention(q, pool, layout, selection, **options)  # pyright: ignore
    return _by_both(q, pool, layout, selection, config, spans, rest, options)


def _by_both(
    q: Tensor,
    pool: KeyPool,
    layout: BatchLayout,
    selection: BlockSelection | None,
    config: HiPConfig,
    spans: list[Rows],
    rest: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Torch's kernel for the rows of `spans`, ours for the query blocks `rest`."""
    if len(rest):
        others = layout.only(config.query_block_size, rest)
        if selection is not None:
            selection = selection.rows(rest)
        out, lse = block_sparse_attention(
            q, pool, others, selection, config=config, check=False, **options
        )
    else:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    scale = options["sm_scale"]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad():
        for span in spans:
            rows, pages = slice(span.begin, span.end), layout.block_table[span.seq]
            for heads, part, part_lse in attend_rows(q[rows], pool, pages, span.position, scale):
                out[rows, heads], lse[rows, heads] = part, part_lse
    return out, lse


def _dense_spans(
    layout: BatchLayout, selection: BlockSelection | None, config: HiPConfig
) -> tuple[list[Rows], Tensor]:
    """Rows that follow each other in query blocks that read everything, enough of them to pay; and
    `[n]` int64, the other query blocks.
    """
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
    rest = torch.tensor([i for i in range(len(blocks)) if i not in mine], dtype=torch.int64)
    return [r for r, _ in taken], rest


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
