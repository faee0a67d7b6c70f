"""`write_kv` and `build_index`: checks, the custom operator and dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hipserve.ops import checks
from hipserve.ops.write_kv import cpu, reference
from hipserve.plan import bound_offsets
from hipserve.platform import resolve_backend
from hipserve.types import KeyIndex, KeyPool


def _backend(name: str, k: Tensor) -> Any:
    chosen = resolve_backend(name, k.device, k.dtype, k.shape[-1])
    if chosen == "triton":
        from hipserve.ops.write_kv import triton

        return triton
    return cpu if chosen == "cpu" else reference


def write_kv(
    k: Tensor,
    v: Tensor,
    pool: KeyPool,
    index: KeyIndex | None,
    slot_mapping: Tensor,
    *,
    backend: str = "auto",
    check: bool = True,
) -> None:
    """Appends keys and values to pages and brings the index of the touched runs up to date.

    A sequence writes its positions in order. Writing a slot ends its page there: the summaries of
    its runs cover the keys up to the last slot written, never what an earlier owner left behind, so
    a page can be truncated, rewritten or handed on at any time.

    >>> import torch
    >>> from hipserve.ops import build_index, write_kv
    >>> from hipserve.types import KeyPool
    >>> pool = KeyPool(*torch.zeros(2, 4, 256, 2, 64))  # 4 pages of 256 keys, 2 heads of 64
    >>> index = build_index(pool.k_cache)
    >>> write_kv(*torch.randn(2, 3, 2, 64), pool, index, torch.tensor([256, 257, 258]))

    Args:
        k, v: `[num_tokens, num_kv_heads, head_dim]`, dtype of the pages.
        pool: the pages.
        index: of the same pages; None, or one without summaries, where no search reads any.
        slot_mapping: `[num_tokens]` int64, page * page_size + offset; -1 skips a token.
        backend: `auto`, `cpu`, `triton` or `reference`.
        check: False skips the checks, for callers that have made them.

    Raises:
        ArgumentError: a tensor does not fit the pages, or a slot lies outside them.
    """
    if check:
        _check(k, v, pool, index, slot_mapping)
    run = _operator if torch.compiler.is_compiling() else _run
    summaries, size = (index.summaries, index.run_size) if index else (None, 1)
    k_cache, v_cache = pool.k_cache, pool.v_cache
    run(k, v, k_cache, v_cache, summaries, slot_mapping, run_size=size, backend=backend)


def build_index(k: Tensor, *, run_size: int | None = 16, backend: str = "auto") -> KeyIndex:
    """The index of pages that are full, or of whole sequences taken as one page each.

    A run's summary is the mean of its keys and their standard deviation, channel by channel.

    Args:
        k: `[num_pages, page_size, num_kv_heads, head_dim]`; the index refers to these keys.
        run_size: keys of the finest run, as `HiPConfig.run_size`; None makes no summaries.
        backend: `auto`, `cpu`, `triton` or `reference`.
    """
    checks.check_floats("k", k, "[num_pages, page_size, num_kv_heads, head_dim]")
    if run_size is None:
        return KeyIndex(k)
    checks.check_size("run_size", run_size)
    run = _summarize_operator if torch.compiler.is_compiling() else _summarize
    return KeyIndex(k, run(k, run_size, backend), run_size)


def _check(
    k: Tensor, v: Tensor, pool: KeyPool, index: KeyIndex | None, slot_mapping: Tensor
) -> None:
    dims = "[num_tokens, num_kv_heads, head_dim]"
    for argument, x in (("k", k), ("v", v)):
        checks.check_floats(argument, x, dims)
        fits = tuple(x.shape[1:]) == tuple(pool.k_cache.shape[2:])
        expected = f"heads and head_dim {list(pool.k_cache.shape[2:])} of the pages"
        checks.require(fits, argument, expected, list(x.shape[1:]))
    checks.check_same("v", v, k)
    checks.check_pool(k, pool)
    if index is not None:
        checks.check_index(k, index, index.run_size if index.summaries is not None else None)
        same = tuple(index.codes.shape) == tuple(pool.k_cache.shape)
        expected = f"codes of shape {list(pool.k_cache.shape)}, as the pool's keys"
        checks.require(same, "index", expected, list(index.codes.shape), "build it of these pages")
    checks.check_tensor("slot_mapping", slot_mapping, "[num_tokens]")
    int64 = slot_mapping.dtype == torch.int64
    checks.require(int64, "slot_mapping", "dtype int64", checks.name(slot_mapping.dtype))
    for argument, x in (("v", v), ("slot_mapping", slot_mapping)):
        same = x.shape[0] == k.shape[0]
        checks.require(same, argument, f"{k.shape[0]} tokens as k", x.shape[0])
    slots = pool.k_cache.shape[0] * pool.page_size
    inside = slot_mapping.numel() == 0 or int(slot_mapping.min()) >= -1
    inside = inside and (slot_mapping.numel() == 0 or int(slot_mapping.max()) < slots)
    checks.require(
        inside, "slot_mapping", f"slots from -1 to {slots - 1}", slot_mapping.tolist()[:8]
    )


def _run(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    summaries: Tensor | None,
    slot_mapping: Tensor,
    run_size: int,
    backend: str,
) -> None:
    write = _backend(backend, k).write_kv
    write(k, v, k_cache, v_cache, summaries, slot_mapping, run_size=run_size)


_operator = torch.library.custom_op(
    "hipserve::write_kv", _run, mutates_args=("k_cache", "v_cache", "summaries")
)


@_operator.register_fake
def _(*_: object, **__: object) -> None:
    return None


def _summarize(k: Tensor, run_size: int, backend: str) -> Tensor:
    """`[num_pages, runs_per_page, num_kv_heads, 2, head_dim]`, dtype of k."""
    return _backend(backend, k).summarize(k, run_size)


_summarize_operator = torch.library.custom_op("hipserve::summarize", _summarize, mutates_args=())


@_summarize_operator.register_fake
def _(k: Tensor, run_size: int, backend: str) -> Tensor:  # noqa: ARG001
    pages, page_size, heads, head_dim = k.shape
    runs = bound_offsets(page_size, run_size)[-1]
    return k.new_empty((pages, runs, heads, 2, head_dim))
