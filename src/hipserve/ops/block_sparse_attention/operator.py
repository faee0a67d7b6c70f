"""`hipserve::block_sparse_attention` as a custom operator: torch.compile sees it whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hipserve.ops.block_sparse_attention import cpu, reference
from hipserve.platform import resolve_backend


def _backend(name: str, q: Tensor, k_cache: Tensor) -> Any:
    """What reads pages for rows q, `[..., head_dim]` both."""
    chosen = resolve_backend(name, q.device, q.dtype, q.shape[-1], k_cache.dtype)
    if chosen == "triton":
        from hipserve.ops.block_sparse_attention import triton

        return triton
    return cpu if chosen == "cpu" else reference


def _run(
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
    v_scale: float,
    softcap: float,
    query_block_size: int,
    lists: Tensor | None,
    page_size: int,
    rope: Tensor | None,
    trained_length: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The operator's schema is this signature."""
    return _backend(backend, q, k_cache).block_sparse_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        query_blocks,
        indices=indices,
        window_start=window_start,
        num_sink_tokens=num_sink_tokens,
        key_block_size=key_block_size,
        sliding_window=sliding_window,
        sm_scale=sm_scale,
        v_scale=v_scale,
        softcap=softcap,
        query_block_size=query_block_size,
        lists=lists,
        page_size=page_size,
        rope=rope,
        trained_length=trained_length,
    )


_operator = torch.library.custom_op("hipserve::block_sparse_attention", _run, mutates_args=())


@_operator.register_fake
def _(q: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=dtype)


def _run_into(
    out: Tensor, q: Tensor, *inputs: Tensor, backend: str, **options: object
) -> tuple[Tensor, Tensor]:
    """As `_run`; kernels for GPUs write to `out` `[num_tokens, num_q_heads, head_dim]`."""
    module = _backend(backend, q, inputs[0])
    taken = module not in (cpu, reference) and out.is_contiguous() and out.dtype == q.dtype
    room = {"out": out} if taken else {}
    return module.block_sparse_attention(q, *inputs, **options, **room)


def attention(out: Tensor | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    """What computes it: the custom operator while torch.compile traces, else the backend itself.

    out: `[num_tokens, num_q_heads, head_dim]`, room for the result, which may be taken.
    """
    if torch.compiler.is_compiling():
        return _operator
    return _run if out is None else functools.partial(_run_into, out)
