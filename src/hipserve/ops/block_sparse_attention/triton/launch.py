"""Launches attention and, where key lists are split, the merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hipserve.ops._triton.tiles import power_of_2
from hipserve.ops.block_sparse_attention.triton.hopper.shape import can_copy, make_shape
from hipserve.ops.block_sparse_attention.triton.inputs import Inputs
from hipserve.ops.block_sparse_attention.triton.kernels import attention_kernel, merge_kernel
from hipserve.ops.block_sparse_attention.triton.tiling import (
    Call,
    Geometry,
    Plan,
    Tiling,
    plan,
)
from hipserve.ops.block_sparse_attention.triton.turned import turned_parts
from hipserve.platform import specialises_warps


def block_sparse_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_blocks: Tensor,
    indices: Tensor | None,
    window_start: Tensor | None,
    *,
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
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hipserve.ops.block_sparse_attention`.

    Returns:
        out: `[num_tokens, num_q_heads, head_dim]`, as `q`.
        lse: `[num_tokens, num_q_heads]` float32.
    """
    tokens, num_q_heads, _ = q.shape
    blocks = query_blocks.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty((tokens, num_q_heads), dtype=torch.float32, device=q.device)
    if not blocks:
        return out, lse
    call = Call(
        q_shape=q.shape,
        k_shape=k_cache.shape,
        longest=block_table.shape[1] * page_size,
        blocks=blocks,
        selected=None if indices is None else indices.shape,
        max_rows=min(query_block_size, tokens - blocks + 1),
        num_sink_tokens=num_sink_tokens,
        key_block_size=key_block_size,
        windowed=sliding_window > 0,
        capped=softcap > 0,
        same_strides=k_cache.stride() == v_cache.stride(),
        tiled=lists is not None,
        streams=rope is not None and indices is not None,
        converted=k_cache.dtype != q.dtype,
        element_size=q.element_size(),
        device=q.device,
    )
    inputs = Inputs(block_table, query_blocks, indices, window_start, lists)
    planned = plan(call)
    parts: Iterable[tuple[Inputs, Tensor | None]] = [(inputs, None)]
    if rope is not None and call.streams:
        parts = turned_parts(q, k_cache, inputs, rope, trained_length, planned)
    shape = make_shape(call) if specialises_warps(q.device) and sm_scale > 0 else None
    if shape is not None and can_copy(q, k_cache, v_cache):
        attend, found = hopper_attention(), (out, lse)
        for some, turned in parts:
            attend(q, k_cache, v_cache, some, turned, found, sm_scale=sm_scale, shape=shape)
        return found
    splits = planned.tiling.splits
    found = (out, lse) if splits == 1 else make_parts(q, splits)
    scores = (sliding_window, (sm_scale, v_scale), softcap)
    for some, turned in parts:
        launch(q, k_cache, v_cache, some, turned, found, scores=scores, planned=planned)
    if splits > 1:
        merge(*found, out, lse, planned.geometry, planned.tiling)
    return out, lse


def launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    inputs: Inputs,
    turned: Tensor | None,
    found: tuple[Tensor, Tensor],
    *,
    scores: tuple[int, tuple[float, float], float],
    planned: Plan,
) -> None:
    """The kernel for every card, for some query blocks of q `[num_tokens, num_q_heads, head_dim]`.

    turned: their moved keys, as `turn_keys` returns them, or None.
    found: `out` and `lse`, or the parts that `make_parts` made room for.
    scores: sliding_window, the scales of scores and of values, and softcap.
    """
    table, query_blocks, indices, window_start, lists = inputs
    geometry, tiling = planned
    blocks, (out, lse) = query_blocks.shape[0], found
    arguments = (  # in the kernel's order; by name they would cost half a microsecond each
        *(q, q.stride()[:2], k_cache, k_cache.stride()[:3], v_cache, v_cache.stride()[:3]),
        *(out, out.stride()[:2], lse, q.shape[0], table, table.stride(0)),
        *(query_blocks, blocks, query_blocks if indices is None else indices),
        query_blocks if window_start is None else window_start,
        *(lists, 0 if lists is None else lists.shape[2], k_cache.shape[1], *scores),
        turned,
    )
    attention_kernel[(blocks * tiling.row_tiles * tiling.splits, geometry.heads)](
        *arguments,
        GEOMETRY=geometry,
        TILING=tiling,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        launch_pdl=tiling.chained,
    )


def hopper_attention() -> Callable[..., None]:
    """The kernel for Hopper; its language is only there where the kernel can run."""
    from hipserve.ops.block_sparse_attention.triton.hopper.launch import attend

    return attend


def make_parts(q: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Room for what the splits of `q` `[num_tokens, num_q_heads, head_dim]` find.

    Returns:
        parts: `[splits * num_tokens, num_q_heads, head_dim]` float32.
        part_lse: the same without the last axis.
    """
    tokens, num_q_heads, head_dim = q.shape
    shape = (splits * tokens, num_q_heads)
    parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    return parts, torch.empty(shape, dtype=torch.float32, device=q.device)


def merge(
    parts: Tensor,
    part_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
    tiling: Tiling,
) -> None:
    """Writes `out` `[num_tokens, num_q_heads, head_dim]` and `lse` `[num_tokens, num_q_heads]` from
    what `make_parts` made room for."""
    tokens, num_q_heads = lse.shape
    merge_kernel[(tokens, num_q_heads)](
        *(parts, part_lse, out, out.stride()[:2], lse, tokens),
        SPLITS=power_of_2(tiling.splits),
        GEOMETRY=geometry,
        TILING=tiling,
        num_warps=8 if geometry.dim > 256 else 2,
        launch_pdl=tiling.chained,
    )
