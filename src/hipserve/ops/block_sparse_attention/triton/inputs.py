"""What query blocks read, all of them or some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """What some query blocks read, as `hipserve.ops.block_sparse_attention` takes it."""

    block_table: Tensor
    query_blocks: Tensor
    indices: Tensor | None
    window_start: Tensor | None
    lists: Tensor | None

    def parts(self, size: int) -> Iterator[Inputs]:
        """The same, so many query blocks at a time."""
        table, *rest = self
        count = self.query_blocks.shape[0]
        for i in range(0, count, size):
            yield Inputs(table, *(None if x is None else x[i : i + size] for x in rest))
