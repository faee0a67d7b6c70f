"""`hipserve::select_blocks` as a custom operator, so that torch.compile sees it whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.ops.select_blocks import cpu, reference
from hipserve.ops.select_blocks.spec import SearchSpec, search_spec
from hipserve.platform import resolve_backend
from hipserve.types import BlockSelection, KeyIndex


def _backend(name: str, q: Tensor) -> Callable[..., Tensor]:
    chosen = resolve_backend(name, q.device, q.dtype, q.shape[-1])
    if chosen == "triton":
        from hipserve.ops.select_blocks import triton

        return triton.select_blocks
    return cpu.select_blocks if chosen == "cpu" else reference.select_blocks


def run(
    q: Tensor,
    index: KeyIndex,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    config: HiPConfig,
    backend: str,
) -> Tensor:
    """Calls the backend, through the custom operator while torch.compile traces."""
    summaries = index.summaries if config.uses_bounds else None
    tensors = (q, index.codes, summaries, block_table, query_blocks, window_starts)
    if torch.compiler.is_compiling():
        return _operator(*tensors, _text(config), backend)
    return _backend(backend, q)(*tensors, search_spec(config))


def refresh(
    q: Tensor,
    index: KeyIndex,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    config: HiPConfig,
    due: Tensor,
    selection: BlockSelection,
    backend: str,
) -> None:
    """Overwrites the entries that are due; only Triton saves the work for the others."""
    kept = (selection.indices, selection.window_start)
    if resolve_backend(backend, q.device, q.dtype, q.shape[-1]) == "triton":
        from hipserve.ops.select_blocks import triton

        summaries = index.summaries if config.uses_bounds else None
        tensors = (q, index.codes, summaries, block_table, query_blocks, window_starts)
        return triton.refresh_blocks(*tensors, search_spec(config), due, *kept)
    made = run(q, index, block_table, query_blocks, window_starts, config, backend)
    kept[0].copy_(torch.where(due[:, None, None] > 0, made, kept[0]))
    kept[1].copy_(torch.where(due > 0, window_starts, kept[1]))


@torch.compiler.assume_constant_result
def _text(config: HiPConfig) -> str:
    """A search as an operator takes it; written while torch.compile traces."""
    return search_spec(config).dumps()


@torch.library.custom_op("hipserve::select_blocks", mutates_args=())
def _operator(
    q: Tensor,
    codes: Tensor,
    summaries: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    spec: str,
    backend: str,
) -> Tensor:
    tensors = (q, codes, summaries, block_table, query_blocks, window_starts)
    return _backend(backend, q)(*tensors, SearchSpec.loads(spec))


@_operator.register_fake
def _(
    q: Tensor,
    codes: Tensor,
    summaries: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    spec: str,
    backend: str,
) -> Tensor:
    shape = SearchSpec.loads(spec).selection_shape(q, codes, query_blocks)
    return q.new_empty(shape, dtype=torch.int32)
