"""Launches a search: baselines, then its steps; in chunks where scratch memory is short."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.errors import BackendError
from hipserve.ops.select_blocks.spec import SearchInputs, SearchSpec
from hipserve.ops.select_blocks.triton.geometry import Call
from hipserve.ops.select_blocks.triton.kernels import baseline_kernel, search_kernel
from hipserve.ops.select_blocks.triton.scratch import ScratchSizes
from hipserve.ops.select_blocks.triton.tiling import plan
from hipserve.types import BlockSelection

SCRATCH_BYTES = 256 * 2**20


def select_blocks(inputs: SearchInputs, spec: SearchSpec) -> Tensor:
    """`indices` `[num_query_blocks, heads, max_selected]` int32; see `hipserve.ops`."""
    shape = spec.selection_shape(inputs)
    indices = torch.empty(shape, dtype=torch.int32, device=inputs.q.device)
    refresh_blocks(inputs, spec, None, BlockSelection(indices, inputs.window_starts))
    return indices


def refresh_blocks(
    inputs: SearchInputs, spec: SearchSpec, refresh: Tensor | None, selection: BlockSelection
) -> None:
    """Selects in place, for the query blocks whose entry in `refresh` is not 0.

    Launches depend on shapes only, so a call can be captured into a CUDA graph.

    refresh: `[num_query_blocks]` int32; None selects for all.
    """
    check_block_size(spec.key_block_size)
    if spec.trained_length is not None and spec.code_bits < 16:
        raise BackendError(
            'the Triton kernels search keys and no codes where extend="stream", so code_bits=16, '
            f"not {spec.code_bits}",
            'set code_bits=16 or use extend="yarn"',
        )
    q, codes, code_scales, summaries, summary_scales, block_table, *blocks = inputs
    query_blocks, window_starts, rope, head_blocks = blocks
    indices, window_start = selection.indices, selection.window_start
    heads, blocks = indices.shape[1], query_blocks.shape[0]
    call = Call(
        q_shape=q.shape,
        k_shape=codes.shape,
        num_runs=0 if summaries is None else summaries.shape[1],
        longest=block_table.shape[1] * codes.shape[1],
        blocks=blocks,
        heads=heads,
        element_size=q.element_size(),
        device=q.device,
    )
    geometry, tiling, sizes = plan(call, spec)
    chunk = min(max(SCRATCH_BYTES // (4 * sum(sizes) * heads), 1), blocks)
    scratch = allocate(sizes, chunk * heads, q)
    scores, lists, baselines, arrivals, query_codes, query_scales, turned = scratch
    inputs = (  # in the order of both kernels; by name they would cost half a microsecond each
        *(q, q.stride()[:2], (codes, codes.stride()[:3], *or_nothing(code_scales, q, 3))),
        *(block_table, block_table.stride(0), codes.shape[1], query_blocks, window_starts),
        *(baselines, arrivals, refresh, indices),
        (query_codes, query_scales),
        *(q if rope is None else rope, turned),
    )
    bounds = (*or_nothing(summaries, q, 4), *or_nothing(summary_scales, q, 4))
    options = {"GEOMETRY": geometry, "TILING": tiling, "launch_pdl": tiling.chained}
    for end in range(blocks, 0, -max(chunk, 1)):
        items = min(chunk, end) * heads
        baseline_kernel[(items * tiling.baseline_programs,)](
            *inputs, end, window_start, num_warps=tiling.num_warps, **options
        )
        for step in range(0, geometry.steps, tiling.together):
            search_kernel[(items * tiling.search_programs,)](
                *(*inputs, end, bounds, scores, lists, head_blocks),
                FIRST=step,
                END=step + tiling.together,
                num_warps=tiling.num_warps,
                num_stages=tiling.stages,
                **options,
            )


def or_nothing(x: Tensor | None, q: Tensor, count: int) -> tuple[Tensor, tuple[int, ...]]:
    """x `[num_pages, ...]` and its first `count` strides; without one, a q that nobody reads."""
    return (q, (0,) * count) if x is None else (x, x.stride()[:count])


def check_block_size(size: int) -> None:
    """Blocks of a tile have to fill it."""
    if size & (size - 1):
        raise BackendError(
            f"the Triton kernels need a key_block_size that is a power of two, not {size}",
            'change it or use backend="reference"',
        )


def allocate(sizes: ScratchSizes, items: int, q: Tensor) -> list[Tensor]:
    """Memory of so many query blocks and heads, as `ScratchSizes` lists it, beside q
    `[num_tokens, num_q_heads, head_dim]`; the first again for what is not needed."""
    f32, i32 = torch.float32, torch.int32
    dtypes = [f32, i32, f32, i32, torch.int8, f32, q.dtype]
    made: list[Tensor] = []
    for size, dtype in zip(sizes, dtypes, strict=True):
        count = items * size * 4 // dtype.itemsize
        made.append(torch.empty(count, dtype=dtype, device=q.device) if size else made[0])
    return made
