"""What an index holds of a page: shapes and dtypes, for whoever allocates its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve.config import IndexForm
from hipserve.plan import bound_offsets, runs_of_pages
from hipserve.types import KeyIndex


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
        """Of one head of a page."""
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
        cls, page_size: int, head_dim: int, dtype: torch.dtype, form: IndexForm
    ) -> IndexLayout:
        """Of pages of longer sequences."""
        num_runs = 0 if form.run_size is None else runs_of_pages(page_size, form.run_size)
        return cls(page_size, num_runs, head_dim, dtype, form)

    @classmethod
    def of_whole(cls, k: Tensor, form: IndexForm) -> IndexLayout:
        """Of keys k `[num_pages, page_size, num_kv_heads, head_dim]`, each page a sequence."""
        page_size, head_dim = k.shape[1], k.shape[3]
        num_runs = 0 if form.run_size is None else bound_offsets(page_size, form.run_size)[-1]
        return cls(page_size, num_runs, head_dim, k.dtype, form)

    @property
    def coded(self) -> bool:
        """Keys have short codes."""
        return self.form.code_bits < 16

    @property
    def codes(self) -> tuple[Rows, Rows] | None:
        """Short codes and their scales."""
        if not self.coded:
            return None
        width = self.head_dim * self.form.code_bits // 8
        row = Rows(self.page_size, (width,), torch.int8)
        return row, Rows(self.page_size, (), torch.bfloat16)

    @property
    def summaries(self) -> tuple[Rows, ...]:
        """Summaries, and their scales beside short codes."""
        if not self.num_runs:
            return ()
        shape = (2, self.head_dim)
        if not self.coded:
            return (Rows(self.num_runs, shape, self.dtype),)
        numbers = Rows(self.num_runs, shape, torch.int8)
        return numbers, Rows(self.num_runs, (2,), torch.bfloat16)

    @property
    def nbytes(self) -> int:
        """Of one head of a page, the keys themselves not counted."""
        return sum(rows.nbytes for rows in self.rows)

    @property
    def rows(self) -> tuple[Rows, ...]:
        """All tensors, in the order of `KeyIndex.tensors`."""
        return (*(self.codes or ()), *self.summaries)

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
