"""Writing keys, values and their index on a GPU: the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.config import IndexForm
from hipserve.ops._triton.tiles import power_of_2
from hipserve.ops.codes import SUMMARY_BITS
from hipserve.ops.write_kv.layout import IndexLayout
from hipserve.ops.write_kv.triton.kernels import (
    codes_kernel,
    summaries_kernel,
    whole_summaries_kernel,
    write_kernel,
)
from hipserve.plan.runs import WRITTEN_LEVELS, bound_levels, bound_offsets
from hipserve.types import KeyIndex, KeyPool

MOMENT_ROWS = 4
"""Keys at a time of a program of its own for a run of the finest level: one warp adds up a channel
without the others (955 us for 131,072 keys of 8 heads with four warps, 93 so, on one H200)."""


def summary_warps(dim: int, rows: int = 16) -> int:
    """Warps of a program that keeps sums of so many keys in registers: 64 of each thread's."""
    return max(dim * rows // 512, 4 if rows == 16 else 1)


def strides_of(x: Tensor | None, count: int) -> tuple[int, ...]:
    """The first `count` strides of x `[num_pages, ...]`; zeros where there is none."""
    return (0,) * count if x is None else x.stride()[:count]


def write_kv(k: Tensor, v: Tensor, pool: KeyPool, index: KeyIndex, slot_mapping: Tensor) -> None:
    """See `hipserve.ops.write_kv`; k, v `[num_tokens, num_kv_heads, head_dim]`, slot_mapping
    `[num_tokens]`."""
    tokens, heads, head_dim = k.shape
    if not tokens:
        return
    k_cache, v_cache, summaries = pool.k_cache, pool.v_cache, index.summaries
    dim, page_size = power_of_2(head_dim), pool.page_size
    num_runs = None if summaries is None else summaries.shape[1]
    lengths = bound_levels(page_size, index.run_size, num_runs)[:WRITTEN_LEVELS]
    offsets = bound_offsets(page_size, index.run_size, num_runs)[: len(lengths) + 1]
    last_slots = None
    if summaries is not None:
        runs = summaries.shape[0] * offsets[-1]
        last_slots = torch.zeros(runs, dtype=torch.int32, device=k.device)
    write_kernel[(tokens,)](
        *(k, k.stride()[:2], v, v.stride()[:2]),
        *(k_cache, k_cache.stride()[:3], v_cache, v_cache.stride()[:3]),
        *(slot_mapping, last_slots, pool.places, page_size, heads),
        *(index.codes, index.codes.stride()[:3]),
        *(index.code_scales, strides_of(index.code_scales, 3)),
        HEADS=power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM=dim,
        LENGTHS=lengths,
        OFFSETS=offsets,
        BITS=index.code_bits,
        num_warps=2,
    )
    if summaries is not None:
        summaries_kernel[(tokens, heads)](
            *(k_cache, k_cache.stride()[:3], summaries, summaries.stride()[:4]),
            *(index.summary_scales, strides_of(index.summary_scales, 4)),
            *(slot_mapping, last_slots, pool.places, page_size),
            HEAD_DIM=head_dim,
            DIM=dim,
            LENGTHS=lengths,
            OFFSETS=offsets,
            BITS=SUMMARY_BITS,
            num_warps=summary_warps(dim),
        )


def build_index(k: Tensor, run_size: int | None, code_bits: int) -> KeyIndex:
    """See `hipserve.ops.build_index`; k `[num_pages, page_size, num_kv_heads, head_dim]`."""
    index = IndexLayout.of_whole(k, IndexForm(run_size, code_bits)).empty_like(k)
    if k.numel() and index.code_scales is not None:
        code_pages(k, index)
    if k.numel() and run_size is not None:
        summarize_pages(k, index)
    return index


def code_pages(k: Tensor, index: KeyIndex) -> None:
    """Writes the codes of k `[num_pages, page_size, num_kv_heads, head_dim]` to the index."""
    num_pages, page_size, heads, head_dim = k.shape
    codes_kernel[(page_size, num_pages)](
        *(k, k.stride()[:3], index.codes, index.codes.stride()[:3]),
        *(index.code_scales, strides_of(index.code_scales, 3), heads),
        HEADS=power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM=power_of_2(head_dim),
        BITS=index.code_bits,
        num_warps=2,
    )


def summarize_pages(k: Tensor, index: KeyIndex) -> None:
    """Writes the summaries of k `[num_pages, page_size, num_kv_heads, head_dim]` to the index."""
    summaries, scales = index.summaries, index.summary_scales
    assert summaries is not None
    num_pages, page_size, heads, head_dim = k.shape
    offsets = bound_offsets(page_size, index.run_size)
    for level, length in enumerate(bound_levels(page_size, index.run_size)[:WRITTEN_LEVELS]):
        whole_summaries_kernel[(offsets[level + 1] - offsets[level], heads, num_pages)](
            k=k,
            k_strides=k.stride()[:3],
            summaries=summaries,
            summaries_strides=summaries.stride()[:4],
            scales=scales,
            scales_strides=strides_of(scales, 4),
            page_size=page_size,
            first_index=offsets[level],
            length=length,
            FINEST=level == 0,
            ROWS=MOMENT_ROWS,
            HEAD_DIM=head_dim,
            DIM=power_of_2(head_dim),
            BITS=SUMMARY_BITS,
            num_warps=summary_warps(power_of_2(head_dim), 16 if level else MOMENT_ROWS),
        )
