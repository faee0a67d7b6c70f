"""What an index holds of a page: shapes and dtypes, for whoever allocates its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve.config import IndexForm
from hipserve.plan import bound_offsets
from hipserve.plan.parts import Part, code_parts, num_runs_of, summary_parts
from hipserve.platform import FP8_DTYPES
from hipserve.types import KeyIndex


def summary_dtype(keys: torch.dtype) -> torch.dtype:
    """The dtype of summaries of keys, beside codes of 16 bits."""
    return torch.bfloat16 if keys in FP8_DTYPES else keys


@dataclass(frozen=True, slots=True)
class Rows:
    """One tensor of an index, `[num_pages, count, num_kv_heads, *shape]`.

    Attributes:
        count: rows of a page and head: its slots, or its runs.
        shape: of a row.
        dtype: of its numbers.
    """

    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one head of a page."""
        return self.count * torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class IndexLayout:
    """Sizes of the index of a page.

    Attributes:
        page_size: slots of a page.
        num_runs: runs of a page that have a summary; 0 for none.
        head_dim: channels of a key.
        dtype: of the keys.
        form: what the index holds of them.
    """

    page_size: int
    num_runs: int
    head_dim: int
    dtype: torch.dtype
    form: IndexForm

    @classmethod
    def of_pages(
        cls, page_size: int, head_dim: int, dtype: torch.dtype, form: IndexForm, keys: int = 0
    ) -> IndexLayout:
        """The layout of pages of longer sequences, with up to `keys` keys."""
        return cls(page_size, num_runs_of(page_size, form, keys), head_dim, dtype, form)

    @classmethod
    def of_whole(cls, k: Tensor, form: IndexForm) -> IndexLayout:
        """The layout of sequences that are a page each.

        k: `[num_pages, page_size, num_kv_heads, head_dim]`.
        """
        page_size, head_dim = k.shape[1], k.shape[3]
        num_runs = 0 if form.run_size is None else bound_offsets(page_size, form.run_size)[-1]
        return cls(page_size, num_runs, head_dim, k.dtype, form)

    @property
    def codes(self) -> tuple[Rows, ...]:
        """Short codes and their scales."""
        return self._typed(code_parts(self.page_size, self.head_dim, self.form))

    @property
    def summaries(self) -> tuple[Rows, ...]:
        """Summaries, and their scales beside short codes."""
        return self._typed(summary_parts(self.num_runs, self.head_dim, self.form))

    def _typed(self, parts: tuple[Part, ...]) -> tuple[Rows, ...]:
        kinds = {"keys": summary_dtype(self.dtype), "int8": torch.int8, "bfloat16": torch.bfloat16}
        return tuple(Rows(part.count, part.shape, kinds[part.dtype]) for part in parts)

    @property
    def nbytes(self) -> int:
        """Bytes of one head of a page, the keys themselves not counted."""
        return sum(rows.nbytes for rows in self.rows)

    @property
    def rows(self) -> tuple[Rows, ...]:
        """All tensors, in the order of `KeyIndex.tensors`."""
        return (*self.codes, *self.summaries)

    def index(self, keys: Tensor, allocate: Callable[[Rows], Tensor]) -> KeyIndex:
        """An index of `keys` `[num_pages, page_size, num_kv_heads, head_dim]` in memory from
        `allocate`, which is called in the order of `KeyIndex.tensors`."""
        codes, code_scales = map(allocate, self.codes) if self.codes else (keys, None)
        summaries, summary_scales = (*map(allocate, self.summaries), None, None)[:2]
        sizes = (self.form.run_size or 16, self.form.code_bits)
        return KeyIndex(codes, summaries, *sizes, code_scales, summary_scales)

    def empty_like(self, k: Tensor) -> KeyIndex:
        """An index of k `[num_pages, page_size, num_kv_heads, head_dim]` in new memory."""
        pages, heads = k.shape[0], k.shape[2]
        return self.index(
            k, lambda row: k.new_empty((pages, row.count, heads, *row.shape), dtype=row.dtype)
        )
