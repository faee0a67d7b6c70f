"""`hipserve::block_sparse_attention` as a custom operator, so that torch.compile sees it whole."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.block_sparse_attention import cpu, reference

_BACKENDS = {"reference": reference.block_sparse_attention, "cpu": cpu.block_sparse_attention}


def run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_blocks: Tensor,
    indices: Tensor | None,
    window_start: Tensor | None,
    num_sink_tokens: int,
    key_block_size: int,
    sliding_window: int,
    sm_scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Calls the backend; the signature is the operator's."""
    return _BACKENDS[backend](
        q,
        k_cache,
        v_cache,
        block_table,
        query_blocks,
        indices,
        window_start,
        num_sink_tokens=num_sink_tokens,
        key_block_size=key_block_size,
        sliding_window=sliding_window,
        sm_scale=sm_scale,
        softcap=softcap,
    )


_eager = run
_operator = torch.library.custom_op("hipserve::block_sparse_attention", _eager, mutates_args=())


@_operator.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=dtype)
