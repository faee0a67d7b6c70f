"""What an index keeps of a page: its tensors, their rows and bytes. Arithmetic, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hipserve.config import IndexForm
from hipserve.plan.runs import runs_of_pages

CACHE_LINE = 64
"""In a KV block of vLLM every tensor of an index ends on a multiple of this."""

WIDTHS = {"int8": 1, "bfloat16": 2}
"""Bytes of the numbers that are not in the dtype of the keys."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an index, `[num_pages, count, num_kv_heads, *shape]`.

    Attributes:
        count: rows of a page and head: its slots, or its runs.
        shape: of a row.
        dtype: of its numbers; `keys` is that of the keys, bfloat16 of those in fp8.
    """

    count: int
    shape: tuple[int, ...]
    dtype: Literal["keys", "int8", "bfloat16"]

    def nbytes(self, key_bytes: int) -> int:
        """Bytes of one head of a page, with keys of `key_bytes` a number."""
        width = WIDTHS.get(self.dtype, max(key_bytes, 2))
        return self.count * math.prod(self.shape) * width


def code_parts(page_size: int, head_dim: int, form: IndexForm) -> tuple[Part, ...]:
    """Short codes and their scales; nothing with 16 bits, the keys themselves."""
    if form.code_bits == 16:
        return ()
    width = head_dim * form.code_bits // 8
    return Part(page_size, (width,), "int8"), Part(page_size, (), "bfloat16")


def summary_parts(num_runs: int, head_dim: int, form: IndexForm) -> tuple[Part, ...]:
    """Summaries of `num_runs` runs of a page, and their scales beside short codes."""
    if not num_runs:
        return ()
    if form.code_bits == 16:
        return (Part(num_runs, (2, head_dim), "keys"),)
    return Part(num_runs, (2, head_dim), "int8"), Part(num_runs, (2,), "bfloat16")


def num_runs_of(page_size: int, form: IndexForm, keys: int = 0) -> int:
    """Runs with a summary in a page of sequences with up to `keys` keys; 0 for none."""
    return 0 if form.run_size is None else runs_of_pages(page_size, form.run_size, keys)


def aligned(nbytes: int) -> int:
    """Up to the end of a cache line."""
    return -(-nbytes // CACHE_LINE) * CACHE_LINE


def index_bytes(
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    key_bytes: int,
    form: IndexForm,
    keys: int = 0,
) -> int:
    """Bytes of the index of a page with all its heads, as KV blocks hold it, keys not counted.

    keys: of the longest sequence.
    """
    parts = code_parts(page_size, head_dim, form)
    parts += summary_parts(num_runs_of(page_size, form, keys), head_dim, form)
    return sum(aligned(num_kv_heads * part.nbytes(key_bytes)) for part in parts)
