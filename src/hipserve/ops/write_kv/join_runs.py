"""Runs longer than a page, joined from the coarse runs in them: the same for every backend.

One run in 4,096 keys takes microseconds, so eager torch computes it on any device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hipserve.errors import ArgumentError
from hipserve.ops import checks
from hipserve.ops.codes import SUMMARY_BITS, encode
from hipserve.plan.runs import BOX_RADIUS, WRITTEN_LEVELS, bound_levels, bound_offsets
from hipserve.types import KeyIndex

AT_ONCE = 4096
"""Summaries that are in memory at a time, or those of one run."""


def join_runs(
    index: KeyIndex,
    block_table: Tensor,
    seq_lens: Sequence[int],
    known: Sequence[int] | None = None,
) -> None:
    """Brings the runs that are longer than a page up to date, after `write_kv`.

    An index of pages has such runs where its sequences may have more than 524,288 keys
    (`runs_of_pages`). A run has the center of the box around the boxes of its coarse runs, and
    `BOX_RADIUS` of its half width. It lies in the page of its last key, so sequences that share
    their first pages share their runs. Only complete runs exist. An index without longer runs is
    left alone.

    >>> import torch
    >>> from hipserve.ops import build_index, join_runs
    >>> index = build_index(torch.randn(1, 1024, 2, 64))
    >>> join_runs(index, torch.zeros(1, 1, dtype=torch.int32), [1024])

    Args:
        index: its runs in pages are up to date.
        block_table: `[num_seqs, max_pages]` int32, page ids of each sequence in order.
        seq_lens: keys of each sequence; numbers, since most calls have nothing to join.
        known: keys of each sequence whose runs were joined before; 0 for all if None.

    Raises:
        ArgumentError: the lengths do not fit the block table.
    """
    checks.check_ints("block_table", block_table, "[num_seqs, max_pages]", index.codes.device)
    for argument, counts in (("seq_lens", seq_lens), ("known", known or [0] * len(seq_lens))):
        if len(counts) != block_table.shape[0]:
            expected = f"{block_table.shape[0]} lengths as block_table has rows"
            raise ArgumentError(argument, expected, str(len(counts)))
    most = block_table.shape[1] * index.page_size
    if max(seq_lens, default=0) > most:
        expected = f"at most {most}, the keys of a row of block_table"
        raise ArgumentError("seq_lens", expected, str(max(seq_lens)))
    join(index, block_table, seq_lens, known or [0] * len(seq_lens))


def join(
    index: KeyIndex, block_table: Tensor, seq_lens: Sequence[int], known: Sequence[int]
) -> None:
    """`join_runs` without checks; block_table `[num_seqs, max_pages]`."""
    if index.summaries is None:
        return
    for level in LongLevel.of(index):
        runs = [
            (seq, run)
            for seq, (begin, end) in enumerate(zip(known, seq_lens, strict=True))
            for run in range(begin // level.length, end // level.length)
        ]
        if not runs:
            return  # then no longer run is complete either
        for part in torch.tensor(runs).split(max(AT_ONCE // level.ratio, 1)):
            level.join(index, block_table, *part.to(block_table.device).T)


class LongLevel(NamedTuple):
    """A level of runs longer than a page.

    Attributes:
        length, entry: keys of a run, and where the level starts in a page.
        coarse, coarse_entry: the same of coarse runs.
    """

    length: int
    entry: int
    coarse: int
    coarse_entry: int

    @classmethod
    def of(cls, index: KeyIndex) -> Iterator[LongLevel]:
        """The levels of an index that are joined, shorter runs first."""
        sizes = (index.page_size, index.run_size, index.num_runs)
        levels = list(zip(bound_levels(*sizes), bound_offsets(*sizes), strict=False))
        for level in levels[WRITTEN_LEVELS:]:
            yield cls(*level, *levels[WRITTEN_LEVELS - 1])

    @property
    def ratio(self) -> int:
        """Coarse runs in one run."""
        return self.length // self.coarse

    def join(self, index: KeyIndex, block_table: Tensor, seqs: Tensor, runs: Tensor) -> None:
        """Joins runs `[n]` int64 of sequences `[n]` int64."""

        def place(last: Tensor, length: int, entry: int) -> tuple[Tensor, Tensor]:
            """Page and entry of the runs with the last keys `last` `[n, count]`."""
            page = block_table[seqs[:, None], last // index.page_size].long()
            return page, entry + last % index.page_size // length

        ends = (torch.arange(self.ratio, device=runs.device) + 1) * self.coarse
        inside = runs[:, None] * self.length + ends - 1  # [n, ratio]
        center, radius = summaries_at(index, *place(inside, self.coarse, self.coarse_entry))
        half = radius / BOX_RADIUS
        low, high = (center - half).amin(1), (center + half).amax(1)
        sides = torch.stack([(low + high) / 2, (high - low) / 2 * BOX_RADIUS], dim=-2)
        put_summaries(index, *place(inside[:, -1:], self.length, self.entry), sides[:, None])


def summaries_at(index: KeyIndex, page: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    """Center and radius `[n, count, num_kv_heads, head_dim]` float32 (float64 of such keys) of the
    summaries at page, entry `[n, count]`."""
    assert index.summaries is not None
    sides = index.summaries[page, entry]
    sides = sides.to(torch.promote_types(sides.dtype, torch.float32))
    if index.summary_scales is not None:
        sides = sides * index.summary_scales[page, entry].float()[..., None]
    center, radius = sides.unbind(-2)
    return center, radius


def put_summaries(index: KeyIndex, page: Tensor, entry: Tensor, sides: Tensor) -> None:
    """Writes sides `[n, count, num_kv_heads, 2, head_dim]` to page, entry `[n, count]`."""
    assert index.summaries is not None
    if index.summary_scales is None:
        index.summaries[page, entry] = sides.to(index.summaries.dtype)
    else:
        numbers, scales = encode(sides, SUMMARY_BITS)
        index.summaries[page, entry] = numbers.to(torch.int8)
        index.summary_scales[page, entry] = scales.bfloat16()
