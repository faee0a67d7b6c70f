"""The pruning rule: which query blocks are pruned, and where their windows start."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from hipserve.config import HiPConfig

if TYPE_CHECKING:
    from torch import Tensor

BREAK_EVEN = {"cpu": 2048, "cuda": 8192}
"""Positions up to which reading everything is cheaper than searching, by device, where nothing was
measured: a CPU measures its own (`hipserve.attention.crossover`)."""

SINGLE_ROW = 3
"""A single row breaks even later than a full query block, by this factor (measured: 2 on a CPU, 2
to 6 on a GPU, falling with the batch size)."""

FURTHEST = 2**31 - 1

Position = TypeVar("Position", int, "Tensor")


class PruningRule(NamedTuple):
    """Which rows read what. It depends on their positions only, so one answer serves all layers.

    Every row reads the sinks [0, num_sink_tokens) and, up to itself, the keys from its query
    block's window start on. What lies between is searched. A block is pruned where more than
    `budget` keys lie there and it ends behind the crossover; every other block has its window start
    at the end of the sinks, and is dense.

    Attributes:
        query_block_size: rows of a query block.
        budget, num_sink_tokens, sliding_window, granularity: in keys, as in `HiPConfig`.
        dense_below: crossover of query blocks of several rows, a position.
        decode_dense_below: crossover of single rows.
        trained_length: query blocks that begin here or behind are pruned wherever they end: they
            see what they read at consecutive positions (`HiPConfig.extend`).
    """

    query_block_size: int
    budget: int
    num_sink_tokens: int
    sliding_window: int
    granularity: int
    dense_below: int
    decode_dense_below: int
    trained_length: int = FURTHEST

    def window_start(self, position: Position, num_rows: Position | int) -> Position:
        """First key of the window of a query block: an int, or a tensor for a tensor of positions.

        The window is the block's: it reaches back `sliding_window` keys from the first row, so the
        searched middle [num_sink_tokens, window start) lies in the past of every row.

        Args:
            position: of the block's first row.
            num_rows: of the block.
        """
        start = position - (self.sliding_window - 1)
        middle = start - start % self.granularity - self.num_sink_tokens
        below = self.dense_below + (num_rows == 1) * (self.decode_dense_below - self.dense_below)
        due = (position + num_rows > below) | (position >= self.trained_length)
        pruned = (middle > self.budget) & due
        return cast("Position", self.num_sink_tokens + pruned * middle)

    def dense_within(self) -> PruningRule:
        """The rule of a layer that is never pruned, but beyond the trained length."""
        return self._replace(dense_below=FURTHEST, decode_dense_below=FURTHEST)

    def prunes(self, position: int, num_rows: int) -> bool:
        """The query block does not read everything."""
        return self.window_start(position, num_rows) > self.num_sink_tokens


def pruning_rule(config: HiPConfig, device: str, dense_below: int | None = None) -> PruningRule:
    """The rule of a configuration on a device (a torch device type).

    `dense_below` is the crossover that was measured there; `BREAK_EVEN` if None. What the
    configuration says comes first.
    """
    fixed = BREAK_EVEN.get(device, BREAK_EVEN["cpu"])
    given = config.dense_below
    row = config.decode_dense_below
    return PruningRule(
        query_block_size=config.query_block_size,
        budget=config.budget,
        num_sink_tokens=config.num_sink_tokens,
        sliding_window=config.sliding_window,
        granularity=config.granularity,
        dense_below=given if given is not None else fixed if dense_below is None else dense_below,
        decode_dense_below=(
            min(SINGLE_ROW * (fixed if given is None else given), FURTHEST) if row is None else row
        ),
        trained_length=(config.trained_length if config.streams else None) or FURTHEST,
    )


@functools.lru_cache(maxsize=1024)
def dense_rows(rule: PruningRule | None, query_len: int) -> int:
    """How many of the first rows of a sequence belong to query blocks that read everything.

    Without a rule, all of them.
    """
    if rule is None:
        return query_len
    size = rule.query_block_size
    return next((p for p in range(0, query_len, size) if rule.prunes(p, size)), query_len)
