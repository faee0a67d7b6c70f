"""`hipserve::select_blocks` as a custom operator, so that torch.compile sees it whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.ops.select_blocks import cpu, reference
from hipserve.platform import resolve_backend
from hipserve.types import PagedKV


def _backend(name: str, q: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    chosen = resolve_backend(name, q.device, q.dtype, q.shape[-1])
    if chosen == "triton":
        from hipserve.ops.select_blocks import triton

        return triton.select_blocks
    return cpu.select_blocks if chosen == "cpu" else reference.select_blocks


def run(
    q: Tensor,
    kv: PagedKV,
    block_table: Tensor,
    query_blocks: Tensor,
    config: HiPConfig,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Calls the backend, through the custom operator while torch.compile traces."""
    k_bounds = kv.k_bounds if config.uses_bounds else None
    tensors = (q, kv.k_cache, k_bounds, block_table, query_blocks)
    if torch.compiler.is_compiling():
        return _operator(*tensors, _text(config), backend)
    return _backend(backend, q)(*tensors, config.on(q.device.type))


def refresh(
    q: Tensor,
    kv: PagedKV,
    block_table: Tensor,
    query_blocks: Tensor,
    config: HiPConfig,
    due: Tensor,
    indices: Tensor,
    window_start: Tensor,
    backend: str,
) -> None:
    """Overwrites the entries that are due; only Triton spares the work for the others."""
    if resolve_backend(backend, q.device, q.dtype, q.shape[-1]) == "triton":
        from hipserve.ops.select_blocks import triton

        k_bounds = kv.k_bounds if config.uses_bounds else None
        tensors = (q, kv.k_cache, k_bounds, block_table, query_blocks)
        return triton.refresh_blocks(*tensors, config, due, indices, window_start)
    made = run(q, kv, block_table, query_blocks, config, backend)
    indices.copy_(torch.where(due[:, None, None] > 0, made[0], indices))
    window_start.copy_(torch.where(due > 0, made[1], window_start))


@torch.compiler.assume_constant_result
def _text(config: HiPConfig) -> str:
    """A configuration as an operator takes it; written while torch.compile traces."""
    return config.dumps("json")


@torch.library.custom_op("hipserve::select_blocks", mutates_args=())
def _operator(
    q: Tensor,
    k_cache: Tensor,
    k_bounds: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    config: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = (q, k_cache, k_bounds, block_table, query_blocks)
    return _backend(backend, q)(*tensors, HiPConfig.loads(config).on(q.device.type))


@_operator.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    k_bounds: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    config: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    parsed = HiPConfig.loads(config)
    heads = k_cache.shape[2] if parsed.share_group else q.shape[1]
    blocks = query_blocks.shape[0]
    shape = (blocks, heads, parsed.max_selected)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(blocks, dtype=torch.int32)
