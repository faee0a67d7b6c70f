"""`hipserve::select_blocks` as a custom operator: torch.compile sees it whole."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.errors import BackendError
from hipserve.ops.select_blocks import cpu, reference
from hipserve.ops.select_blocks.spec import SearchInputs, SearchSpec, search_spec
from hipserve.platform import logger, resolve_backend
from hipserve.types import BlockSelection, KeyIndex


def select(inputs: SearchInputs, spec: SearchSpec, backend: str) -> Tensor:
    """`indices` `[num_query_blocks, heads, max_selected]`, by the backend."""
    return _backend(backend, inputs, spec.selector.name).select_blocks(inputs, spec)


def _backend(name: str, inputs: SearchInputs, selector: str) -> ModuleType:
    """The backend that runs: as for every operation, if it has the selector."""
    q = inputs.q
    chosen = resolve_backend(name, q.device, q.dtype, q.shape[-1], inputs.codes.dtype)
    module = _module(chosen)
    if selector in module.SEARCHES:
        return module
    if name != "auto":
        raise BackendError(
            f'backend="{chosen}" cannot run: selector "{selector}" has no kernels there',
            'use backend="auto" or backend="reference"',
        )
    _announce_reference(selector, chosen)
    return reference


@functools.cache
def _module(name: str) -> ModuleType:
    """A backend, imported when it is first asked for."""
    if name == "triton":
        from hipserve.ops.select_blocks import triton

        return triton
    return cpu if name == "cpu" else reference


@functools.cache
def _announce_reference(selector: str, backend: str) -> None:
    """Says once that a search is slow."""
    logger.warning('selector "%s" has no %s kernels: eager torch searches', selector, backend)


def search_inputs(
    q: Tensor,
    index: KeyIndex,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    *,
    config: HiPConfig,
    rope: Tensor | None = None,
) -> SearchInputs:
    """Tensors as `SearchInputs` has them, `[num_tokens, num_q_heads, head_dim]` first."""
    heads = index.num_kv_heads if config.share_group else q.shape[1]
    blocks = (
        *(block_table, query_blocks, window_starts),
        rope if config.streams else None,
        _head_blocks(config, index.num_kv_heads, heads, q.device),
    )
    if config.run_size is None:
        return SearchInputs(q, index.codes, index.code_scales, None, None, *blocks)
    summaries = (index.summaries, index.summary_scales)
    return SearchInputs(q, index.codes, index.code_scales, *summaries, *blocks)


def _head_blocks(
    config: HiPConfig, num_kv_heads: int, heads: int, device: torch.device
) -> Tensor | None:
    """`SearchInputs.head_blocks`; None where all heads choose equally many."""
    if not any(config.budget_factors):
        return None
    blocks = [n for n in config.head_blocks(num_kv_heads) for _ in range(heads // num_kv_heads)]
    make = _ints.__wrapped__ if torch.compiler.is_compiling() else _ints
    return make(tuple(blocks), device)


@functools.cache  # a graph that was captured reads them as long as it lives
def _ints(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def run(inputs: SearchInputs, config: HiPConfig, backend: str) -> Tensor:
    """`indices` `[num_query_blocks, heads, max_selected]`.

    Calls the backend, through the custom operator while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return _operator(*inputs, _text(config, inputs.rope is not None), backend)
    return select(inputs, search_spec(config, inputs.rope is not None), backend)


def refresh(
    inputs: SearchInputs, config: HiPConfig, due: Tensor, selection: BlockSelection, backend: str
) -> None:
    """Overwrites the entries that are due; only Triton saves the work for the others.

    due: `[num_query_blocks]` int32.
    """
    spec = search_spec(config, inputs.rope is not None)
    module = _backend(backend, inputs, spec.selector.name)
    if module not in (cpu, reference):
        return module.refresh_blocks(inputs, spec, due, selection)
    made = run(inputs, config, backend)
    indices, starts = selection.indices, selection.window_start
    indices.copy_(torch.where(due[:, None, None] > 0, made, indices))
    starts.copy_(torch.where(due > 0, inputs.window_starts, starts))
    return None


@torch.compiler.assume_constant_result
def _text(config: HiPConfig, moved: bool) -> str:
    """A search as an operator takes it; written while torch.compile traces."""
    return search_spec(config, moved).dumps()


@torch.library.custom_op("hipserve::select_blocks", mutates_args=())
def _operator(
    q: Tensor,
    codes: Tensor,
    code_scales: Tensor | None,
    summaries: Tensor | None,
    summary_scales: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    rope: Tensor | None,
    head_blocks: Tensor | None,
    spec: str,
    backend: str,
) -> Tensor:
    blocks = (block_table, query_blocks, window_starts, rope, head_blocks)
    inputs = SearchInputs(q, codes, code_scales, summaries, summary_scales, *blocks)
    return select(inputs, SearchSpec.loads(spec), backend)


@_operator.register_fake
def _(
    q: Tensor,
    codes: Tensor,
    code_scales: Tensor | None,
    summaries: Tensor | None,
    summary_scales: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    rope: Tensor | None,
    head_blocks: Tensor | None,
    spec: str,
    backend: str,
) -> Tensor:
    blocks = (block_table, query_blocks, window_starts, rope, head_blocks)
    inputs = SearchInputs(q, codes, code_scales, summaries, summary_scales, *blocks)
    return q.new_empty(SearchSpec.loads(spec).selection_shape(inputs), dtype=torch.int32)
