"""Rows that read everything, by torch's own dense kernels where those are the fastest: on a GPU."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hipserve.attention.sinks import absorb_sinks
from hipserve.config import HiPConfig

KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


@functools.lru_cache(maxsize=1024)
def dense_rows(config: HiPConfig | None, query_len: int) -> int:
    """How many of the first rows of a sequence belong to query blocks that read everything.

    `config` has its `dense_below` settled; None is a dense layer.
    """
    if config is None:
        return query_len
    size, sinks = config.query_block_size, config.num_sink_tokens
    positions = range(0, query_len, size)
    return next((p for p in positions if config.window_start(p, size) > sinks), query_len)


def dense_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: HiPConfig | None,
    *,
    sm_scale: float | None,
    softcap: float,
    sink_logits: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The output of the first rows of whole sequences: those that read everything.

    `[batch, rows, num_q_heads, head_dim]` by cuDNN or FlashAttention; no rows where those are not
    the fastest or not able: off the GPU, in 32 bits, with a softcap, or behind keys that are there
    already. q, k and v as in `hip_attention`, `config` as in `dense_rows`, `sink_logits` as in
    `absorb_sinks`.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    able = q.is_cuda and half and q.shape[-1] <= 256 and k.shape[1] == q.shape[1] and not softcap
    if not able or backend != "auto" or torch.compiler.is_compiling():
        return q[:, :0]
    rows = dense_rows(config, q.shape[1])
    q, k, v = (x[:, :rows].transpose(1, 2) for x in (q, k, v))
    if sink_logits is not None:
        return _head_with_sinks(q, k, v, sm_scale, sink_logits)
    with sdpa_kernel(KERNELS, set_priority=True):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=sm_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2)


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
