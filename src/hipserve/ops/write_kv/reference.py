"""The definition of `write_kv` and of the index of a page: eager torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.codes import SUMMARY_BITS, encode, pack, rotate
from hipserve.ops.fp8 import to_pages
from hipserve.ops.write_kv.layout import summary_dtype
from hipserve.plan.runs import BOX_RADIUS, WRITTEN_LEVELS, bound_levels, bound_offsets
from hipserve.types import KeyIndex, KeyPool


def write_kv(k: Tensor, v: Tensor, pool: KeyPool, index: KeyIndex, slot_mapping: Tensor) -> None:
    """See `hipserve.ops.write_kv`; k, v `[num_tokens, num_kv_heads, head_dim]`, slot_mapping
    `[num_tokens]`."""
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    page, slot = slots // pool.page_size, slots % pool.page_size
    place = page if pool.places is None else pool.places[page].long()
    keys = to_pages(k[written], pool.k_cache.dtype, pool.k_scale)
    pool.k_cache[place, slot] = keys
    pool.v_cache[place, slot] = to_pages(v[written], pool.v_cache.dtype, pool.v_scale)
    if index.code_scales is not None:
        codes, scales = key_codes(keys, index.code_bits)
        index.codes[page, slot], index.code_scales[page, slot] = codes, scales
    if index.summaries is None:
        return
    sizes = (pool.page_size, index.run_size, index.num_runs)
    offsets = bound_offsets(*sizes)
    for level, length in enumerate(bound_levels(*sizes)[:WRITTEN_LEVELS]):
        runs_per_page = offsets[level + 1] - offsets[level]
        run = page * runs_per_page + slot // length
        for touched in run.unique().tolist():
            of_page, i = divmod(touched, runs_per_page)
            page_end = int(slot[page == of_page].max()) + 1
            place_of = of_page if pool.places is None else int(pool.places[of_page])
            keys = pool.k_cache[place_of, i * length : min((i + 1) * length, page_end)]
            put_summary(index, of_page, offsets[level] + i, summary(keys, level))


def build_index(k: Tensor, run_size: int | None, code_bits: int) -> KeyIndex:
    """See `hipserve.ops.build_index`; k `[num_pages, page_size, num_kv_heads, head_dim]`."""
    codes, code_scales = (k, None) if code_bits == 16 else key_codes(k, code_bits)
    index = KeyIndex(codes, None, run_size or 16, code_bits, code_scales)
    if run_size is None:
        return index
    levels, offsets = bound_levels(k.shape[1], run_size), bound_offsets(k.shape[1], run_size)
    written = [
        torch.stack([summary(run, level, dim=1) for run in k.split(length, dim=1)], dim=1)
        for level, length in enumerate(levels[:WRITTEN_LEVELS])
    ]
    longer = offsets[-1] - offsets[len(written)]  # these are joined later
    unknown = written[0].new_zeros(k.shape[0], longer, *written[0].shape[2:])
    runs = torch.cat([*written, unknown], dim=1)  # [pages, runs, heads, 2, head_dim]
    if code_scales is None:
        return KeyIndex(codes, runs.to(summary_dtype(k.dtype)), run_size)
    numbers, scales = encode(runs, SUMMARY_BITS)
    summaries = (numbers.to(torch.int8), scales.bfloat16())
    return KeyIndex(codes, summaries[0], run_size, code_bits, code_scales, summaries[1])


def key_codes(k: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """int8 codes `[..., head_dim * bits / 8]`, bfloat16 scales `[...]` of k `[..., head_dim]`."""
    numbers, scales = encode(rotate(k), bits)
    return pack(numbers, bits), scales.bfloat16()


def put_summary(index: KeyIndex, page: int, run: int, of_run: Tensor) -> None:
    """Writes the summary `of_run` `[num_kv_heads, 2, head_dim]`."""
    assert index.summaries is not None
    if index.summary_scales is None:
        index.summaries[page, run] = of_run.to(index.summaries.dtype)
    else:
        index.summaries[page, run], index.summary_scales[page, run] = encode(of_run, SUMMARY_BITS)


def summary(keys: Tensor, level: int, dim: int = 0) -> Tensor:
    """`[..., heads, 2, head_dim]`: center and radius of the keys along axis `dim`.

    Runs of the finest level (0) by mean and deviation, which rank them best on average. Longer
    runs by their box: among 128 keys a deviation no longer shows a single key that stands out.
    """
    return moments(keys, dim) if level == 0 else box(keys, dim)


def moments(keys: Tensor, dim: int) -> Tensor:
    """`[..., heads, 2, head_dim]`: mean and standard deviation.

    Sums of 16-bit numbers are exact in float64, whatever their order, so all backends agree to the
    bit.
    """
    x, n = keys.double(), keys.shape[dim]
    total, squares = x.sum(dim), x.square().sum(dim)
    deviation = (n * squares - total.square()).clamp(min=0).sqrt() / n
    return torch.stack([total / n, deviation], dim=-2)


def box(keys: Tensor, dim: int) -> Tensor:
    """`[..., heads, 2, head_dim]`: middle of minimum and maximum, and `BOX_RADIUS` of half their
    distance."""
    x = keys.double() if keys.dtype == torch.float64 else keys.float()
    low, high = x.amin(dim), x.amax(dim)
    return torch.stack([(low + high) / 2, (high - low) / 2 * BOX_RADIUS], dim=-2).double()
