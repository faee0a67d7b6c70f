"""Writing keys, values and their index by the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.config import IndexForm
from hipserve.errors import BackendError
from hipserve.ops.write_kv.layout import IndexLayout
from hipserve.types import KeyIndex, KeyPool


def write_kv(k: Tensor, v: Tensor, pool: KeyPool, index: KeyIndex, slot_mapping: Tensor) -> None:
    """See `hipserve.ops.write_kv`; k, v `[num_tokens, num_kv_heads, head_dim]`, slot_mapping
    `[num_tokens]`."""
    if pool.places is not None:
        raise BackendError('backend="cpu" cannot run: it writes no staged pages')
    torch.ops.hipserve_cpu.write_kv(
        k,
        v,
        pool.k_cache,
        pool.v_cache,
        slot_mapping,
        *index.parts,
        index.run_size,
        index.code_bits,
    )


def build_index(k: Tensor, run_size: int | None, code_bits: int) -> KeyIndex:
    """See `hipserve.ops.build_index`; k `[num_pages, page_size, num_kv_heads, head_dim]`."""
    index = IndexLayout.of_whole(k, IndexForm(run_size, code_bits)).empty_like(k)
    torch.ops.hipserve_cpu.build_index(
        k,
        *index.parts,
        index.run_size,
        index.code_bits,
    )
    return index
