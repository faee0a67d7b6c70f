"""`write_kv` and `build_index`: checks, the custom operator and dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hipserve.config import IndexForm
from hipserve.ops import checks
from hipserve.ops.write_kv import cpu, reference
from hipserve.ops.write_kv.join_runs import join
from hipserve.ops.write_kv.layout import IndexLayout, summary_dtype
from hipserve.platform import resolve_backend
from hipserve.types import KeyIndex, KeyPool


def _backend(name: str, device: torch.device, dtype: torch.dtype, pages: Tensor) -> Any:
    """What writes rows of this dtype, on this device, to `pages` `[..., head_dim]`."""
    chosen = resolve_backend(name, device, dtype, pages.shape[-1], pages.dtype)
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
    whole_runs: bool = False,
    apart: bool = False,
    check: bool = True,
) -> None:
    """Appends keys and values to pages and brings the index of the touched runs up to date.

    A sequence writes its positions in order. Writing a slot ends its page there: the summaries of
    its runs cover the keys up to the last slot written, never what an earlier owner left behind, so
    a page can be truncated, rewritten or handed on at any time. Runs longer than a page are joined
    afterwards, by `join_runs`.

    >>> import torch
    >>> from hipserve.ops import build_index, write_kv
    >>> from hipserve.types import KeyPool
    >>> pool = KeyPool(*torch.zeros(2, 4, 256, 2, 64))  # 4 pages of 256 keys, 2 heads of 64
    >>> index = build_index(pool.k_cache)
    >>> write_kv(*torch.randn(2, 3, 2, 64), pool, index, torch.tensor([256, 257, 258]))

    Args:
        k, v: `[num_tokens, num_kv_heads, head_dim]`, dtype of the pages; any for pages in fp8,
            which hold k / `pool.k_scale` and v / `pool.v_scale`, cut off at the largest number.
        pool: the pages. With `places`, slots are those of the index.
        index: of the same pages; None, or one without summaries, where no search reads any.
        slot_mapping: `[num_tokens]` int64, page * page_size + offset; -1 skips a token.
        backend: `auto`, `cpu`, `triton` or `reference`.
        whole_runs: nobody reads the summary of a run before its last slot is written, as searches
            do not: until then it may be out of date.
        apart: the same, and no two tokens are of one sequence: a GPU takes one launch.
        check: False skips the checks, for callers that have made them.

    Raises:
        ArgumentError: a tensor does not fit the pages, or a slot lies outside them.
    """
    if check:
        _check(k, v, pool, index, slot_mapping)
    index = index or KeyIndex(pool.k_cache)
    if torch.compiler.is_compiling() and pool.places is None:
        _write_operator(
            *(k, v, pool.k_cache, pool.v_cache, slot_mapping),
            *index.parts,
            run_size=index.run_size,
            code_bits=index.code_bits,
            k_scale=pool.k_scale,
            v_scale=pool.v_scale,
            backend=backend,
        )
    else:
        module = _backend(backend, k.device, k.dtype, pool.k_cache)
        late = (whole_runs or apart) and index.summaries is not None
        if late and module not in (cpu, reference):  # these keep every summary up to date
            module.write_whole_runs(k, v, pool, index, slot_mapping, apart)
        else:
            module.write_kv(k, v, pool, index, slot_mapping)


def build_index(
    k: Tensor, *, run_size: int | None = 16, code_bits: int = 16, backend: str = "auto"
) -> KeyIndex:
    """The index of pages that are full, or of whole sequences taken as one page each.

    A run's summary is a center and a radius, channel by channel: mean and standard deviation of
    its keys in the finest runs, middle and half the width of their box in longer ones. A page of
    more than 524,288 keys has the runs of `join_runs` too.

    Args:
        k: `[num_pages, page_size, num_kv_heads, head_dim]`; with codes of 16 bits the index refers
            to these keys. In fp8 it takes them as they are, without a scale.
        run_size: keys of the finest run, as `HiPConfig.run_size`; None makes no summaries.
        code_bits: bits of a channel of a key's code: 4, 8 or 16, as `HiPConfig.code_bits`.
        backend: `auto`, `cpu`, `triton` or `reference`.

    Raises:
        ArgumentError: k is no tensor of keys, or the sizes are out of range.
        BackendError: the backend asked for cannot run.
    """
    dims = "[num_pages, page_size, num_kv_heads, head_dim]"
    checks.check_floats("k", k, dims, checks.PAGE_DTYPES)
    checks.check_code_bits(code_bits, k.shape[-1])
    if run_size is not None:
        checks.check_size("run_size", run_size)
    elif code_bits == 16:
        return KeyIndex(k)
    if not torch.compiler.is_compiling():
        return _build(k, run_size, code_bits, backend)
    made = iter(_build_operator(k, run_size, code_bits, backend))
    return IndexLayout.of_whole(k, IndexForm(run_size, code_bits)).index(k, lambda _: next(made))


def _build(k: Tensor, run_size: int | None, code_bits: int, backend: str) -> KeyIndex:
    """`build_index` without checks; each page of k `[num_pages, page_size, num_kv_heads, head_dim]`
    is all that its long runs are joined from."""
    module = _backend(backend, k.device, summary_dtype(k.dtype), k)
    index = module.build_index(k, run_size, code_bits)
    table = torch.arange(k.shape[0], device=k.device)[:, None]
    join(index, table, [k.shape[1]] * k.shape[0], [0] * k.shape[0])
    return index


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
        run_size = index.run_size if index.summaries is not None else None
        checks.check_index(k, index, run_size, index.code_bits)
        pages = (pool.k_cache if pool.places is None else pool.places).shape[0]
        same = (*index.codes.shape[:3], index.head_dim) == (pages, *pool.k_cache.shape[1:])
        expected = f"codes of keys of shape {list(pool.k_cache.shape)}, the pool's"
        checks.require(same, "index", expected, list(index.codes.shape), "build it of these pages")
    checks.check_tensor("slot_mapping", slot_mapping, "[num_tokens]")
    int64 = slot_mapping.dtype == torch.int64
    checks.require(int64, "slot_mapping", "dtype int64", checks.name(slot_mapping.dtype))
    for argument, x in (("v", v), ("slot_mapping", slot_mapping)):
        same = x.shape[0] == k.shape[0]
        checks.require(same, argument, f"{k.shape[0]} tokens as k", x.shape[0])
    slots = (pool.k_cache if pool.places is None else pool.places).shape[0] * pool.page_size
    inside = slot_mapping.numel() == 0 or int(slot_mapping.min()) >= -1
    inside = inside and (slot_mapping.numel() == 0 or int(slot_mapping.max()) < slots)
    checks.require(
        inside, "slot_mapping", f"slots from -1 to {slots - 1}", slot_mapping.tolist()[:8]
    )


@torch.library.custom_op(
    "hipserve::write_kv",
    mutates_args=(
        *("k_cache", "v_cache", "codes", "code_scales"),
        *("summaries", "summary_scales"),
    ),
)
def _write_operator(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    codes: Tensor | None,
    code_scales: Tensor | None,
    summaries: Tensor | None,
    summary_scales: Tensor | None,
    run_size: int,
    code_bits: int,
    k_scale: float,
    v_scale: float,
    backend: str,
) -> None:
    short = (code_bits, code_scales, summary_scales)
    index = KeyIndex(k_cache if codes is None else codes, summaries, run_size, *short)
    pool = KeyPool(k_cache, v_cache, k_scale=k_scale, v_scale=v_scale)
    module = _backend(backend, k.device, k.dtype, k_cache)
    module.write_kv(k, v, pool, index, slot_mapping)


@_write_operator.register_fake
def _(*_: object, **__: object) -> None:
    return None


@torch.library.custom_op("hipserve::build_index", mutates_args=())
def _build_operator(k: Tensor, run_size: int | None, code_bits: int, backend: str) -> list[Tensor]:
    """The tensors of `KeyIndex.tensors`."""
    return _build(k, run_size, code_bits, backend).tensors()


@_build_operator.register_fake
def _(k: Tensor, run_size: int | None, code_bits: int, backend: str) -> list[Tensor]:  # noqa: ARG001
    return IndexLayout.of_whole(k, IndexForm(run_size, code_bits)).empty_like(k).tensors()
