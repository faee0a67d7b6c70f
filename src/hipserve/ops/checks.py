"""Checks shared by the operations; every refusal is an `ArgumentError` that names the argument."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
from torch import Tensor

from hipserve.config import CODE_BITS, HiPConfig
from hipserve.errors import ArgumentError
from hipserve.plan import BatchLayout, bound_levels, bound_offsets, runs_of_pages
from hipserve.plan.runs import WRITTEN_LEVELS
from hipserve.platform import FP8_DTYPES
from hipserve.types import KeyIndex, KeyPool

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PAGE_DTYPES = (*DTYPES, *FP8_DTYPES)


def require(condition: bool, argument: str, expected: str, got: object, hint: str = "") -> None:
    if not condition:
        raise ArgumentError(argument, expected, str(got), hint)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The checks of every call build their sentences only where something is wrong: that takes longer
# than a short call.


def check_tensor(argument: str, x: object, dims: str, *, contiguous: bool = True) -> None:
    """`x` is a strided tensor with the axes named in `dims`, the last one `contiguous`."""
    if not isinstance(x, Tensor):
        raise ArgumentError(argument, f"a tensor {dims}", type(x).__name__)
    if x.dim() != dims.count(",") + 1:
        raise ArgumentError(argument, dims, f"shape {list(x.shape)}")
    if contiguous and x.shape[-1] > 1 and x.stride(-1) != 1:
        got, hint = f"strides {list(x.stride())}", f"call {argument}.contiguous()"
        raise ArgumentError(argument, "a contiguous last axis", got, hint)


def check_floats(
    argument: str, x: object, dims: str, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    check_tensor(argument, x, dims)
    assert isinstance(x, Tensor)
    if x.dtype not in dtypes:
        allowed = ", ".join(map(name, dtypes))
        raise ArgumentError(argument, f"dtype {allowed}", name(x.dtype))


def check_same(argument: str, x: Tensor, q: Tensor, dtype: torch.dtype | None = None) -> None:
    """`x` `[...]` has the dtype, unless another is given, and the device of `q`
    `[..., head_dim]`."""
    if x.dtype != (dtype or q.dtype):
        expected = f"dtype {name(dtype)}" if dtype else f"dtype {name(q.dtype)} as q"
        raise ArgumentError(argument, expected, name(x.dtype))
    if x.device != q.device:
        raise ArgumentError(argument, f"device {q.device} as q", str(x.device))


def check_rows(argument: str, x: object, q: Tensor) -> None:
    """Pages `x` `[num_pages, page_size, num_kv_heads, head_dim]` of keys or values can be read by
    `q` `[..., head_dim]`: in its dtype, or in fp8."""
    check_floats(argument, x, "[num_pages, page_size, num_kv_heads, head_dim]", PAGE_DTYPES)
    assert isinstance(x, Tensor)
    check_same(argument, x, q, x.dtype if x.dtype in FP8_DTYPES else None)


def check_ints(argument: str, x: object, dims: str, device: torch.device) -> None:
    check_tensor(argument, x, dims)
    assert isinstance(x, Tensor)
    require(x.dtype == torch.int32, argument, "dtype int32", name(x.dtype))
    require(x.device == device, argument, f"device {device} as q", x.device)


def check_heads(q: Tensor, num_kv_heads: int, head_dim: int, kv: str) -> None:
    """`q` `[..., num_q_heads, head_dim]` has whole groups of heads, and the head_dim of `kv`."""
    if num_kv_heads == 0 or q.shape[-2] % num_kv_heads:
        expected = f"a number of heads divisible by the {num_kv_heads} of {kv}"
        raise ArgumentError("q", expected, str(q.shape[-2]))
    if q.shape[-1] != head_dim:
        raise ArgumentError("q", f"head_dim {head_dim} as {kv}", str(q.shape[-1]))


def check_size(argument: str, value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    good = whole and cast("int", value) > 0
    require(good, argument, "a whole number, 1 or more", value)


def check_scale(value: float) -> None:
    """Selection ranks by q.k: a negative factor would reverse the order."""
    good = _is_number(value) and value >= 0
    require(good, "sm_scale", "a finite number, 0 or more", value, "leave it out for the default")


def _is_number(value: object) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(cast("float", value))


def check_rope(q: Tensor, rope: Tensor | None, config: HiPConfig) -> None:
    """What a config that extends its model by `stream` needs besides: `rope` `[2, head_dim]` for
    `q` `[num_tokens, num_q_heads, head_dim]`, and the trained length."""
    if not config.streams:
        return
    if rope is None or config.trained_length is None:
        missing = "rope" if rope is None else "config.trained_length"
        hint = "pass what hipserve.ops.rope.pack_rope makes, and set trained_length"
        raise ArgumentError(missing, 'a value, as extend="stream" needs', "None", hint)
    check_ints("rope", rope, "[2, head_dim]", q.device)
    good = rope.shape == (2, q.shape[-1])
    require(good, "rope", f"shape [2, {q.shape[-1]}]", list(rope.shape))
    chosen = config.max_selected * config.key_block_size
    keys = config.num_sink_tokens + chosen + config.sliding_window + config.query_block_size
    if config.trained_length < 2 * keys:
        expected = f"{2 * keys:,} or more, twice what a row reads"
        hint = 'lower budget and sliding_window, or use extend="yarn"'
        raise ArgumentError("trained_length", expected, f"{config.trained_length:,}", hint)


def check_softcap(value: float) -> None:
    good = _is_number(value) and value >= 0
    require(good, "softcap", "a finite number, 0 for none", value, "leave it out for none")


def check_pool(q: Tensor, pool: object) -> None:
    """Pages agree with each other and with `q` `[num_tokens, num_q_heads, head_dim]`."""
    if not isinstance(pool, KeyPool):
        raise ArgumentError("pool", "a KeyPool", type(pool).__name__, "pass KeyPool(k, v)")
    check_rows("k_cache", pool.k_cache, q)
    check_rows("v_cache", pool.v_cache, q)
    check_same("v_cache", pool.v_cache, pool.k_cache, pool.k_cache.dtype)
    check_page_scales(pool)
    shape = list(pool.k_cache.shape)
    same = list(pool.v_cache.shape) == shape
    require(same, "v_cache", f"shape {shape} as k_cache", list(pool.v_cache.shape))
    check_heads(q, pool.num_kv_heads, pool.head_dim, "k_cache")


def check_page_scales(pool: KeyPool) -> None:
    fp8 = pool.k_cache.dtype in FP8_DTYPES
    for argument, scale in (("k_scale", pool.k_scale), ("v_scale", pool.v_scale)):
        good = _is_number(scale) and scale > 0 and (fp8 or scale == 1)
        expected = "a positive finite number" if fp8 else "1, as pages are not in fp8"
        require(good, argument, expected, scale)


def check_code_bits(bits: object, head_dim: int) -> None:
    """Codes of so many bits exist, for keys of `head_dim` channels."""
    fits = isinstance(bits, int) and bits in CODE_BITS
    require(fits, "code_bits", "4, 8 or 16", bits, "16 searches the keys themselves")
    if bits == 4 and head_dim % 2:
        hint = "use code_bits=8"
        raise ArgumentError("code_bits", "8 or 16 for an odd head_dim", "4", hint)


def check_index(q: Tensor, index: object, run_size: int | None, code_bits: int) -> None:
    """The index agrees with q `[..., num_q_heads, head_dim]`; `run_size` None: no summaries are
    read."""
    if not isinstance(index, KeyIndex):
        hint = "build it with hipserve.ops.build_index"
        raise ArgumentError("index", "a KeyIndex", type(index).__name__, hint)
    hint = f"build it with code_bits={code_bits}"
    require(
        index.code_bits == code_bits, "index", f"codes of {code_bits} bits", index.code_bits, hint
    )
    check_code_bits(code_bits, q.shape[-1])
    if code_bits == 16:
        check_rows("codes", index.codes, q)
    else:
        dims = "[num_pages, page_size, num_kv_heads, head_dim * code_bits / 8]"
        check_short("codes", index.codes, dims, torch.int8, q)
        dims, shape = "[num_pages, page_size, num_kv_heads]", list(index.codes.shape[:3])
        # Heads are the last axis, and not in one piece where pages hold one after the other.
        check_short("code_scales", index.code_scales, dims, torch.bfloat16, q, contiguous=False)
        assert index.code_scales is not None
        found = list(index.code_scales.shape)
        require(found == shape, "code_scales", f"shape {shape} as codes", found, "use build_index")
    check_heads(q, index.num_kv_heads, index.head_dim, "codes")
    if run_size is not None:
        check_summaries(q, index, run_size)


def check_short(
    argument: str,
    x: object,
    dims: str,
    dtype: torch.dtype,
    q: Tensor,
    *,
    contiguous: bool = True,
) -> None:
    """x, with the axes `dims`, is a part of short codes on the device of q `[..., head_dim]`."""
    check_tensor(argument, x, dims, contiguous=contiguous)
    assert isinstance(x, Tensor)
    require(x.dtype == dtype, argument, f"dtype {name(dtype)}", name(x.dtype), "use build_index")
    require(x.device == q.device, argument, f"device {q.device} as q", x.device, "move it")


def check_summaries(q: Tensor, index: KeyIndex, run_size: int) -> None:
    """Summaries of the index fit its codes and q `[..., num_q_heads, head_dim]`."""
    dims = "[num_pages, runs_per_page, num_kv_heads, 2, head_dim]"
    hint = "build the index with hipserve.ops.build_index, and keep it with write_kv"
    require(index.summaries is not None, "summaries", f"a tensor {dims}", None, hint)
    check_size("run_size", index.run_size)
    own, asked = index.run_size, f"run_size={run_size}"
    require(own == run_size, "index", f"runs of {run_size} keys", own, f"build it with {asked}")
    assert index.summaries is not None
    if index.code_scales is None:
        check_floats("summaries", index.summaries, dims)
        fp8 = index.codes.dtype in FP8_DTYPES
        check_same("summaries", index.summaries, q, torch.bfloat16 if fp8 else None)
    else:
        check_short("summaries", index.summaries, dims, torch.int8, q)
        dims, shape = "[num_pages, runs_per_page, num_kv_heads, 2]", index.summaries.shape[:4]
        check_short("summary_scales", index.summary_scales, dims, torch.bfloat16, q)
        assert index.summary_scales is not None
        found = list(index.summary_scales.shape)
        same = found == list(shape)
        require(same, "summary_scales", f"shape {list(shape)}", found, "use build_index")
    page_size, found = index.page_size, list(index.summaries.shape)
    known = {runs_of_pages(page_size, own), bound_offsets(page_size, own)[-1]}
    deeper = found[1] > max(known) and bound_offsets(page_size, own, found[1])[-1] == found[1]
    runs = found[1] if deeper or found[1] in known else max(known)
    shape = [index.codes.shape[0], runs, index.num_kv_heads, 2, index.head_dim]
    require(found == shape, "summaries", str(shape), found, hint)


def check_page_size(page_size: int, size: int, num_runs: int) -> None:
    """Runs of keys do not straddle the pages of a sequence that has several."""
    longest = bound_levels(page_size, size, num_runs)[:WRITTEN_LEVELS][-1]
    require(
        page_size % longest == 0,
        "page_size",
        f"a multiple of {longest} (runs of {size} keys and their parents)",
        page_size,
        "choose a power of two or another bound_block_size",
    )


def check_layout(q: Tensor, keys: KeyPool | KeyIndex, layout: BatchLayout) -> None:
    """Lengths and page ids are consistent: no kernel reads outside the pages.

    q: `[num_tokens, num_q_heads, head_dim]`.
    """
    device = q.device
    check_ints("block_table", layout.block_table, "[num_seqs, max_pages]", device)
    check_ints("seq_lens", layout.seq_lens, "[num_seqs]", device)
    check_ints("cu_seqlens_q", layout.cu_seqlens_q, "[num_seqs + 1]", device)
    seqs = layout.num_seqs
    for argument, x, count in (
        ("cu_seqlens_q", layout.cu_seqlens_q, seqs + 1),
        ("block_table", layout.block_table, seqs),
    ):
        require(x.shape[0] == count, argument, f"{count} rows for {seqs} sequences", x.shape[0])
    check_lengths(q, layout)
    check_pages(keys, layout)


def check_lengths(q: Tensor, layout: BatchLayout) -> None:
    """The rows of `q` `[num_tokens, num_q_heads, head_dim]` are divided among the sequences."""
    starts = layout.cu_seqlens_q.tolist()
    ordered = starts[0] == 0 and all(a <= b for a, b in itertools.pairwise(starts))
    require(
        ordered and starts[-1] == q.shape[0],
        "cu_seqlens_q",
        f"ascending from 0 to the {q.shape[0]} rows of q",
        starts if len(starts) < 9 else f"{starts[:8]}...",
        "pass cumulative query lengths",
    )
    for seq, seq_len in enumerate(layout.seq_lens.tolist()):
        query_len = starts[seq + 1] - starts[seq]
        require(
            seq_len >= query_len,
            "seq_lens",
            f"at least the {query_len} query rows of sequence {seq}",
            seq_len,
            "count the keys of this call too",
        )


def check_pages(keys: KeyPool | KeyIndex, layout: BatchLayout) -> None:
    page_size = keys.page_size
    num_pages = (keys.k_cache if isinstance(keys, KeyPool) else keys.codes).shape[0]
    for seq, seq_len in enumerate(layout.seq_lens.tolist()):
        used = -(-seq_len // page_size)
        require(
            used <= layout.block_table.shape[1],
            "block_table",
            f"{used} pages of {page_size} keys for sequence {seq} of {seq_len} keys",
            f"{layout.block_table.shape[1]} columns",
            "add pages",
        )
        pages = layout.block_table[seq, :used]
        inside = used == 0 or bool(((pages >= 0) & (pages < num_pages)).all())
        require(
            inside,
            "block_table",
            f"page ids from 0 to {num_pages - 1}",
            f"{pages.tolist()[:8]} in sequence {seq}",
        )
