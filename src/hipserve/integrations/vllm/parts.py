"""Cuts a step with keys in host memory into parts that the device's memory holds.

Sequences with few rows read tiles together, as many as fit the arena. Every other one is a part of
its own, whose pages are staged: there is staging for one sequence of the longest context.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from hipserve.cache import Write
from hipserve.cache.tiles import TILED_ROWS, TilesRead, most_row_tiles, row_tiles
from hipserve.errors import FitError
from hipserve.integrations.vllm.step import HiPStep
from hipserve.plan import BatchLayout, StepPlan, split_batch

if TYPE_CHECKING:
    from torch import Tensor

    from hipserve.config import HiPConfig
    from hipserve.plan import PruningRule

Decision = tuple[int, bool]


class Room(NamedTuple):
    """What tiles a part may read.

    Attributes:
        slots: of the arena, for one KV head.
        lists: of a query block that one KV head serves.
        config, rule: of the layers.
        longest: keys of a sequence.
    """

    slots: int
    lists: int
    config: HiPConfig
    rule: PruningRule
    longest: int

    @property
    def row_tiles(self) -> int:
        """Maximum tiles of a list of a row that decodes, wherever it is."""
        return most_row_tiles(self.config, self.rule, self.longest)

    @property
    def rows(self) -> int:
        """Rows that decode for which there are tiles wherever they are. A graph that vLLM replays
        is chosen before anyone looks at lengths: it has no more rows."""
        return self.slots // (self.lists * self.row_tiles)

    def serves(self, reads: TilesRead) -> bool:
        """So many tiles fit, and so few rows read tiles."""
        few = reads.few(self.config.query_block_size)
        return few and reads.total * self.lists <= self.slots

    def check(self) -> None:
        """Raises FitError where a single row that decodes reads more tiles than there are."""
        needed = self.lists * row_tiles(self.config)
        if needed > self.slots:
            raise FitError(
                f"a row reads {needed} tiles of a KV head, and device_memory has room for "
                f"{self.slots} in every layer",
                "raise device_memory, or lower budget or sliding_window",
            )

    def reads(self, layout: BatchLayout) -> list[TilesRead]:
        """Of every sequence."""
        of: list[list[list[int]]] = [[] for _ in range(layout.num_seqs)]
        for block in layout.host_blocks(self.config.query_block_size):
            of[block[0]].append(block)
        rules = self.config, self.rule
        return [TilesRead.of_blocks(blocks, *rules) if blocks else TilesRead() for blocks in of]


def writes_of(block_table: Tensor, layout: BatchLayout, page_size: int) -> list[Write]:
    """What every sequence appends; block_table `[num_seqs, max_pages]` on the host."""
    assert layout.lengths is not None
    seq_lens, starts = layout.lengths
    writes: list[Write] = []
    for i, (first, last) in enumerate(itertools.pairwise(starts)):
        end, rows = seq_lens[i], last - first
        pages = block_table[i, : -(-end // page_size)].tolist() if rows else []
        writes.append(Write(pages, end - rows, end))
    return writes


def cut(step: HiPStep, decisions: Sequence[Decision] | None, room: Room) -> HiPStep:
    """The step with its parts; a step that tiles serve as a whole has none.

    decisions: of all sequences, as `StepPlan.make` takes them.
    """
    layout = step.plan.layout
    runs = [*runs_that_fit(room.reads(layout), room)]
    if len(runs) > 1 or any(end - begin < layout.num_seqs for begin, end, _ in runs):
        # Rows whose pages are staged are written last and read first: they are there then.
        runs.sort(key=lambda run: not run[2])
        step.parts = [_part(step, decisions, begin, end) for begin, end, _ in runs]
    return step


def runs_that_fit(reads: Sequence[TilesRead], room: Room) -> Iterator[tuple[int, int, bool]]:
    """Sequences [begin, end) that make a part, in order, and whether tiles serve them; sequences
    without rows, which pad a batch, belong to none. One with more rows than tiles serve in a query
    block writes staged pages: it is alone."""
    begin, held = 0, TilesRead()
    for i, mine in enumerate([*reads, None]):
        if mine is not None and mine.rows:
            joined = held.beside(mine)
            short = max(mine.rows, reads[begin].rows) <= TILED_ROWS
            if begin == i or (short and room.serves(joined)):
                held = joined
                continue
        if begin < i:
            yield begin, i, room.serves(held)
        begin, held = (i, mine) if mine is not None and mine.rows else (i + 1, TilesRead())


def part_of(layout: BatchLayout, begin: int, end: int) -> BatchLayout:
    """The sequences [begin, end) of a batch."""
    assert layout.lengths is not None
    seq_lens, starts = layout.lengths
    first = starts[begin]
    return BatchLayout(
        layout.block_table[begin:end],
        layout.seq_lens[begin:end],
        layout.cu_seqlens_q[begin : end + 1] - first,
        (seq_lens[begin:end], [start - first for start in starts[begin : end + 1]]),
    )


def _part(step: HiPStep, decisions: Sequence[Decision] | None, begin: int, end: int) -> HiPStep:
    whole, rule = step.plan.layout, step.plan.rule
    layout, _ = split_batch(part_of(whole, begin, end), rule.query_block_size)
    assert whole.lengths is not None
    first, last = whole.lengths[1][begin], whole.lengths[1][end]
    rows = last - first
    return replace(
        step,
        num_tokens=rows,
        first_row=first,
        slot_mapping=step.slot_mapping[first:last],
        plan=StepPlan.make(layout, rule, decisions and decisions[begin:end]),
        single_rows=rows == end - begin,
        writes=step.writes[begin:end],
        due_runs=None,
        parts=[],
    )
