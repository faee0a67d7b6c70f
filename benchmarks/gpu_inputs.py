"""Gaussian queries and keys of one layer of an 8B model, with planted topics or in pages."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from hipserve import HiPConfig
from hipserve.cache.store import empty_pages
from hipserve.ops import build_index, join_runs
from hipserve.plan import BatchLayout
from hipserve.types import KeyIndex, KeyPool

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 256


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def inputs(length: int, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian q, k, v; every stretch of 256 keys has a topic that some query blocks share."""
    g = torch.Generator("cuda").manual_seed(length)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": g}
    k, v = torch.randn(2, 1, length, KV_HEADS, DIM, **options)
    q = torch.randn(1, rows or length, HEADS, DIM, **options)
    topics = torch.randn(1, -(-length // 256), KV_HEADS, DIM, **options)
    k += topics.repeat_interleave(256, 1)[:, :length]
    picks = torch.randint(topics.shape[1], (-(-q.shape[1] // 64), 3), device="cuda", generator=g)
    wanted = topics[0, picks].mean(1).repeat_interleave(HEADS // KV_HEADS, 1)
    q += wanted.repeat_interleave(64, 0)[None, : q.shape[1]]
    return q, k, v


def paged(
    k: Tensor,
    v: Tensor,
    query_len: int,
    config: HiPConfig,
    page_dtype: torch.dtype = torch.bfloat16,
) -> tuple[KeyPool, KeyIndex, BatchLayout]:
    k, v = k.to(page_dtype), v.to(page_dtype)
    batch, length = k.shape[:2]
    index = build_index(k, **config.index_form._asdict())
    ints: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    layout = BatchLayout(
        torch.arange(batch, **ints)[:, None],
        torch.full((batch,), length, **ints),
        torch.arange(batch + 1, **ints) * query_len,
    )
    return KeyPool(k, v), index, layout


def decode_inputs(
    length: int,
    batch: int,
    config: HiPConfig,
    seed: int = 0,
    page_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, KeyPool, KeyIndex, BatchLayout]:
    """One row for each of `batch` sequences in shuffled pages, the same pages for every seed.

    The pages are those of `HiPCache`: a head's keys lie together.
    """
    g = torch.Generator("cuda").manual_seed(length + batch)
    count = length // PAGE
    ints: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    table = torch.randperm(batch * count, device="cuda", generator=g).view(batch, count).int()
    layout = BatchLayout(
        table, torch.full((batch,), length, **ints), torch.arange(batch + 1, **ints)
    )
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    options["generator"] = g.manual_seed(seed)
    q = torch.randn(batch, HEADS, DIM, **options)
    like = q[:, :KV_HEADS].to(page_dtype)
    pool, index = empty_pages(batch * count, PAGE, config.index_form, like)
    for x in (pool.k_cache, pool.v_cache):
        for page in x:
            page.copy_(torch.randn(page.shape, **options))
    made = build_index(pool.k_cache, **config.index_form._asdict())
    for held, rows in zip(index.tensors(), made.tensors(), strict=True):
        held[:, : rows.shape[1]] = rows
    join_runs(index, table, [length] * batch)
    return q, pool, index, layout


def contiguous(x: Tensor, block_table: Tensor) -> Tensor:
    """`[batch, length, num_kv_heads, head_dim]` out of the pages, a head's rows together."""
    pages = x[block_table.long()].to(torch.bfloat16).permute(0, 3, 1, 2, 4)
    return pages.flatten(2, 3).contiguous().transpose(1, 2)
