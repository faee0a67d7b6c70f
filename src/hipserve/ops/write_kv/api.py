"""`write_kv` and `compute_bounds`: checks, the custom operator and dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hipserve.ops import checks
from hipserve.ops.write_kv import cpu, reference
from hipserve.plan import bound_offsets
from hipserve.platform import resolve_backend
from hipserve.types import PagedKV


def _backend(name: str, k: Tensor) -> Any:
    chosen = resolve_backend(name, k.device, k.dtype, k.shape[-1])
    if chosen == "triton":
        from hipserve.ops.write_kv import triton

        return triton
    return cpu if chosen == "cpu" else reference


def write_kv(
    k: Tensor,
    v: Tensor,
    kv: PagedKV,
    slot_mapping: Tensor,
    *,
    bound_block_size: int = 16,
    backend: str = "auto",
    check: bool = True,
) -> None:
    """Appends keys and values to pages and brings the bounds of the touched runs up to date.

    A sequence writes its positions in order. Writing a slot ends its page there: the bounds of its
    runs cover the keys up to the last slot written, never what an earlier owner left behind, so a
    page can be truncated, rewritten or handed on at any time.

    Args:
        k, v: `[num_tokens, num_kv_heads, head_dim]`, dtype of the pages.
        kv: the pages; bounds are written where `kv.k_bounds` is given.
        slot_mapping: `[num_tokens]` int64, page * page_size + offset; -1 skips a token.
        bound_block_size: keys of the finest run, as in `HiPConfig`.
        backend: `auto`, `cpu`, `triton` or `reference`.
        check: False skips the checks, for callers that have made them.

    Raises:
        ArgumentError: a tensor does not fit the pages, or a slot lies outside them.
    """
    if check:
        _check(k, v, kv, slot_mapping, bound_block_size)
    run = _operator if torch.compiler.is_compiling() else _run
    run(k, v, kv.k_cache, kv.v_cache, kv.k_bounds, slot_mapping, bound_block_size, backend)


def compute_bounds(k: Tensor, *, bound_block_size: int = 16, backend: str = "auto") -> Tensor:
    """Bounds of pages that are full, or of whole sequences taken as one page each.

    Args:
        k: `[num_pages, page_size, num_kv_heads, head_dim]`.
        bound_block_size: keys of the finest run, as in `HiPConfig`.
        backend: `auto`, `cpu`, `triton` or `reference`.

    Returns:
        `[num_pages, runs_per_page, num_kv_heads, 2, head_dim]`, dtype of k.
    """
    checks.check_floats("k", k, "[num_pages, page_size, num_kv_heads, head_dim]")
    checks.check_size("bound_block_size", bound_block_size)
    run = _bounds_operator if torch.compiler.is_compiling() else _compute_bounds
    return run(k, bound_block_size, backend)


def _check(k: Tensor, v: Tensor, kv: PagedKV, slot_mapping: Tensor, bound_block_size: int) -> None:
    dims = "[num_tokens, num_kv_heads, head_dim]"
    for argument, x in (("k", k), ("v", v)):
        checks.check_floats(argument, x, dims)
        fits = tuple(x.shape[1:]) == tuple(kv.k_cache.shape[2:])
        expected = f"heads and head_dim {list(kv.k_cache.shape[2:])} of the pages"
        checks.require(fits, argument, expected, list(x.shape[1:]), "match the pages")
    checks.check_same("v", v, k)
    checks.check_size("bound_block_size", bound_block_size)
    checks.check_kv(k, kv, bound_block_size if kv.k_bounds is not None else None)
    checks.check_tensor("slot_mapping", slot_mapping, "[num_tokens]")
    int64 = slot_mapping.dtype == torch.int64
    checks.require(int64, "slot_mapping", "dtype int64", checks.name(slot_mapping.dtype), "convert")
    for argument, x in (("v", v), ("slot_mapping", slot_mapping)):
        same = x.shape[0] == k.shape[0]
        checks.require(same, argument, f"{k.shape[0]} tokens as k", x.shape[0], "match them")
    slots = kv.k_cache.shape[0] * kv.page_size
    inside = slot_mapping.numel() == 0 or int(slot_mapping.min()) >= -1
    inside = inside and (slot_mapping.numel() == 0 or int(slot_mapping.max()) < slots)
    checks.require(
        inside, "slot_mapping", f"slots from -1 to {slots - 1}", slot_mapping.tolist()[:8], "check"
    )


def _run(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_bounds: Tensor | None,
    slot_mapping: Tensor,
    bound_block_size: int,
    backend: str,
) -> None:
    _backend(backend, k).write_kv(k, v, k_cache, v_cache, k_bounds, slot_mapping, bound_block_size)


_operator = torch.library.custom_op(
    "hipserve::write_kv", _run, mutates_args=("k_cache", "v_cache", "k_bounds")
)


@_operator.register_fake
def _(*_: object) -> None:
    return None


def _compute_bounds(k: Tensor, bound_block_size: int, backend: str) -> Tensor:
    return _backend(backend, k).compute_bounds(k, bound_block_size)


_bounds_operator = torch.library.custom_op(
    "hipserve::compute_bounds", _compute_bounds, mutates_args=()
)


@_bounds_operator.register_fake
def _(k: Tensor, bound_block_size: int, backend: str) -> Tensor:  # noqa: ARG001
    pages, page_size, heads, head_dim = k.shape
    runs = bound_offsets(page_size, bound_block_size)[-1]
    return k.new_empty((pages, runs, heads, 2, head_dim))
