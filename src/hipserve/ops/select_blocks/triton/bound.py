"""The descent through summaries: from the coarsest runs to the finest, then to blocks in them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.constants import HashedOnce
from hipserve.ops._triton.tiles import power_of_2
from hipserve.ops.rope import segment_length
from hipserve.ops.select_blocks.spec import SearchSpec
from hipserve.ops.select_blocks.triton.barrier import grid_barrier
from hipserve.ops.select_blocks.triton.far import greatest_shift, shift_of
from hipserve.ops.select_blocks.triton.geometry import (
    Call,
    Geometry,
    Sharing,
    TileSizes,
    shared_geometry,
)
from hipserve.ops.select_blocks.triton.item import selected_blocks
from hipserve.ops.select_blocks.triton.rerank import choose_in_runs, score_far_kept, score_kept
from hipserve.ops.select_blocks.triton.run_score import (
    SummaryRows,
    load_run_queries,
    load_summaries,
    score_runs,
)
from hipserve.ops.select_blocks.triton.scratch import level_runs, level_scores
from hipserve.ops.select_blocks.triton.threshold import keep_best
from hipserve.plan.runs import (
    bound_levels,
    bound_offsets,
    kept_runs,
    levels_within,
    pruning_levels,
)
from hipserve.selectors import Bound


@dataclass(frozen=True, kw_only=True)
class BoundGeometry(Geometry):
    """What the descent is.

    Lists with one entry a level have the finest first. `candidates` and `blocks` are rounded up to
    powers of two.

    Attributes:
        lengths: keys of a run of each level.
        offsets: where the runs of each level start in a page, and where the last one ends.
        candidates: most runs that are scored, of each level.
        kept: runs that are kept, of each level.
        blocks: most key blocks that the re-rank scores.
    """

    __hash__ = HashedOnce.__hash__
    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    candidates: tuple[int, ...]
    kept: tuple[int, ...]
    blocks: int

    @property
    def options(self) -> Bound:
        assert isinstance(self.spec.selector, Bound)
        return self.spec.selector

    @property
    def reach(self) -> float:
        return self.options.bound_reach

    @property
    def levels(self) -> int:
        return len(self.lengths)

    @property
    def ratios(self) -> tuple[int, ...]:
        """Runs of each level in one of the level above; 1 for the topmost."""
        return (*(long // short for short, long in itertools.pairwise(self.lengths)), 1)

    @classmethod
    def of(cls, call: Call, spec: SearchSpec) -> BoundGeometry:
        options, run_size = spec.selector, spec.run_size
        assert isinstance(options, Bound)
        assert run_size is not None
        sizes = (call.k_shape[1], run_size, call.num_runs)
        lengths, offsets = bound_levels(*sizes), bound_offsets(*sizes)
        ranked = spec.budget * max(options.rerank, 1)
        if spec.trained_length is not None:
            lengths = levels_within(lengths, segment_length(spec.trained_length))
        lengths = pruning_levels(lengths, kept_runs(ranked, lengths), call.longest)
        kept = kept_runs(ranked, lengths)
        candidates = tuple(map(power_of_2, count_candidates(lengths, kept, call.longest)))
        blocks = power_of_2(ranked // spec.key_block_size)
        return cls(
            **shared_geometry(call, spec),
            lengths=lengths,
            offsets=offsets[: len(lengths) + 1],
            candidates=candidates,
            kept=kept,
            blocks=blocks,
            score_size=max([*candidates, blocks]),
            list_size=power_of_2(max([*kept, blocks])),
            steps=len(lengths) + (2 if options.rerank else 1),
        )

    def share(self, call: Call, tile: TileSizes, *, most: int, few_rows: bool) -> Sharing:
        counts = count_candidates(self.lengths, self.kept, call.longest)
        keys = self.kept[0] * self.lengths[0] if self.options.rerank else 0
        programs = max(min(most, max(keys // tile.keys, *(n // tile.runs for n in counts))), 1)
        runs = [tile_runs(n, tile.runs, programs) if few_rows else tile.runs for n in counts]
        return Sharing(programs, tuple(runs))


def count_candidates(
    lengths: tuple[int, ...], kept: tuple[int, ...], longest: int
) -> tuple[int, ...]:
    """Most runs that are scored, of each level: all of the coarsest, and children of the others."""
    children = [
        parent // length * (count + 2)  # and what parents leave at both ends
        for length, parent, count in zip(lengths, lengths[1:], kept[1:], strict=False)
    ]
    return (*children, power_of_2(max(longest // lengths[-1], 1)))


def tile_runs(count: int, most: int, sharers: int) -> int:
    """Runs of a tile, `most` or half: with which the busiest program that shares does less."""
    return min((most, most // 2), key=lambda runs: -(-count // (runs * sharers)) * runs)


class Candidates(NamedTuple):
    """The runs of a level that are scored: some before, the children of kept parents, some behind.

    Parents lie wholly in what is searched; the runs at both ends have none.
    """

    first: Any
    """The first run of the level that lies wholly in what is searched."""
    before: Any
    """Candidates before the children."""
    parents: Any
    """Kept runs of the level above, whose children are candidates."""
    behind: Any
    """The first run behind all parents."""
    count: Any


@triton.jit
def candidates_of(item, kept, LEVEL: tl.constexpr, GEOMETRY: tl.constexpr):
    """The `Candidates` of a level, below `kept` runs of the level above."""
    LENGTH: tl.constexpr = GEOMETRY.lengths[LEVEL]
    RATIO: tl.constexpr = GEOMETRY.ratios[LEVEL]
    first = (item.begin + LENGTH - 1) // LENGTH
    last = tl.maximum(first, item.end // LENGTH)
    low, high = last, last
    if GEOMETRY.levels - 1 > LEVEL:
        low = (item.begin + LENGTH * RATIO - 1) // (LENGTH * RATIO) * RATIO
        high = item.end // (LENGTH * RATIO) * RATIO
        parents = low < high
        low, high = tl.where(parents, low, last), tl.where(parents, high, last)
    before = tl.maximum(tl.minimum(low, last) - first, 0)
    behind = tl.maximum(high, first)
    count = before + kept * RATIO + tl.maximum(last - behind, 0)
    return Candidates(first, before, kept, behind, count)


@triton.jit
def candidate_runs(c, parents, candidates, RATIO: tl.constexpr):
    """Runs of the candidates `c`, like it; `parents` points to the kept runs of the level above."""
    first, before, behind = candidates.first, candidates.before, candidates.behind
    children = candidates.parents * RATIO
    inner = (c >= before) & (c < before + children)
    parent = tl.load(parents + (c - before) // RATIO, mask=inner, other=0)  # like c
    child = parent * RATIO + (c - before) % RATIO
    outer = tl.where(c < before, first + c, behind + c - before - children)
    return tl.where(inner, child, outer)


@triton.jit
def count_kept(item, kept, LEVEL: tl.constexpr, GEOMETRY: tl.constexpr):
    """How many runs of a level are kept, below `kept` runs of the level above."""
    KEEP: tl.constexpr = GEOMETRY.kept[LEVEL]
    return tl.minimum(candidates_of(item, kept, LEVEL, GEOMETRY).count, KEEP)


@triton.jit
def keep_level(item, kept, LEVEL: tl.constexpr, GEOMETRY: tl.constexpr):
    """Keeps the best candidates of a level, below `kept` runs of the level above, in order."""
    SIZE: tl.constexpr = GEOMETRY.candidates[LEVEL]
    count = count_kept(item, kept, LEVEL, GEOMETRY)
    candidates = candidates_of(item, kept, LEVEL, GEOMETRY)
    scores = level_scores(item.scratch, LEVEL)
    chosen, index = keep_best(scores, candidates.count, count, SIZE)
    parents = level_runs(item.scratch, LEVEL + 1)
    runs = candidate_runs(tl.arange(0, SIZE), parents, candidates, GEOMETRY.ratios[LEVEL])
    tl.store(level_runs(item.scratch, LEVEL) + index, runs, mask=chosen)  # [SIZE]
    tl.debug_barrier()


@triton.jit
def score_level(item, kept, LEVEL: tl.constexpr, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """Scores the candidates of a level by their summaries, with the programs that share them."""
    scores = level_scores(item.scratch, LEVEL)
    candidates = candidates_of(item, kept, LEVEL, GEOMETRY)
    queries = load_run_queries(item.queries, 0, 0, GEOMETRY, TILING)
    RUNS: tl.constexpr = TILING.runs[LEVEL]
    STEP: tl.constexpr = TILING.search_programs * RUNS
    n = candidates.count
    first = tl.program_id(0) % TILING.search_programs * RUNS
    i = tl.arange(0, RUNS)
    at = summaries_of(first + i, item, candidates, LEVEL, GEOMETRY)
    for start in tl.range(first, n, STEP, num_stages=1):
        c = start + i
        summaries = load_summaries(at, item.bounds, c < n, GEOMETRY)
        # What is next is looked up while these are on their way.
        at = summaries_of(c + STEP, item, candidates, LEVEL, GEOMETRY)
        best = score_runs(queries, item.queries, 0, summaries, GEOMETRY, TILING)
        tl.store(scores + c, best, mask=c < n)  # [RUNS]


@triton.jit
def score_far_level(item, kept, LEVEL: tl.constexpr, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`score_level` where far runs are seen nearer: candidates ascend, so those of one segment
    follow each other, and the query rows are turned once for all of them."""
    scores = level_scores(item.scratch, LEVEL)
    candidates = candidates_of(item, kept, LEVEL, GEOMETRY)
    RUNS: tl.constexpr = TILING.runs[LEVEL]
    share = tl.cdiv(candidates.count, TILING.search_programs)
    start = tl.program_id(0) % TILING.search_programs * share
    end = tl.minimum(start + share, candidates.count)
    i = tl.arange(0, RUNS)
    keys = candidate_keys(start + i, item, candidates, LEVEL, GEOMETRY)
    at = summaries_of(start + i, item, candidates, LEVEL, GEOMETRY)
    while start < end:
        shift = greatest_shift(item.queries.far, keys, start + i < end, GEOMETRY)
        queries = load_run_queries(item.queries, 0, shift, GEOMETRY, TILING)
        seen = shift
        while seen == shift:
            c = start + i
            same = (c < end) & (shift_of(item.queries.far, keys, GEOMETRY) == shift)
            summaries = load_summaries(at, item.bounds, same, GEOMETRY)
            # What is next is looked up while these are on their way.
            start += tl.sum(same.to(tl.int32), axis=0)
            keys = candidate_keys(start + i, item, candidates, LEVEL, GEOMETRY)
            at = summaries_of(start + i, item, candidates, LEVEL, GEOMETRY)
            seen = greatest_shift(item.queries.far, keys, start + i < end, GEOMETRY)
            best = score_runs(queries, item.queries, shift, summaries, GEOMETRY, TILING)
            tl.store(scores + c, best, mask=same)  # [RUNS]


@triton.jit
def candidate_keys(c, item, candidates, LEVEL: tl.constexpr, GEOMETRY: tl.constexpr):
    """Where the candidates `c` of a level begin, like it."""
    parents = level_runs(item.scratch, LEVEL + 1)
    return candidate_runs(c, parents, candidates, GEOMETRY.ratios[LEVEL]) * GEOMETRY.lengths[LEVEL]


@triton.jit
def summaries_of(c, item, candidates, LEVEL: tl.constexpr, GEOMETRY: tl.constexpr):
    """The `SummaryRows` of the candidates `c` of a level, like it; a run lies with its last key."""
    LENGTH: tl.constexpr = GEOMETRY.lengths[LEVEL]
    bounds = item.bounds
    key = candidate_keys(c, item, candidates, LEVEL, GEOMETRY) + LENGTH - 1
    there = c < candidates.count
    # like c
    page = tl.load(bounds.table + key // bounds.page_size, mask=there, other=0).to(tl.int64)
    run = (GEOMETRY.offsets[LEVEL] + key % bounds.page_size // LENGTH).to(tl.int64)
    rows = bounds.start + page * bounds.strides.page + run * bounds.strides.run
    scales = rows
    if GEOMETRY.spec.code_bits < 16:
        scales = bounds.scales + page * bounds.scale_strides.page + run * bounds.scale_strides.run
    return SummaryRows(rows, scales)


@triton.jit
def search_bound(
    item,
    item_id,
    indices,
    head_blocks,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    GEOMETRY: tl.constexpr,
    TILING: tl.constexpr,
):
    """The steps [FIRST, END) of the descent; the last one writes the chosen blocks.

    head_blocks: `[heads]`, how many each head may choose, or None.

    Each of the others keeps the best of what the one before it scored, and scores what is in them:
    runs of the next level, or at last keys.
    """
    kept = 0
    LEVELS: tl.constexpr = GEOMETRY.levels
    STEPS: tl.constexpr = GEOMETRY.steps
    for n in tl.static_range(LEVELS):
        if n >= FIRST and n < END:
            if GEOMETRY.streams:
                score_far_level(item, kept, LEVELS - 1 - n, GEOMETRY, TILING)
            else:
                score_level(item, kept, LEVELS - 1 - n, GEOMETRY, TILING)
            if n + 1 < END:
                grid_barrier(item.scratch.arrivals, n + 1, TILING)
        if n + 1 >= FIRST and n + 1 < END:
            keep_level(item, kept, LEVELS - 1 - n, GEOMETRY)
        kept = count_kept(item, kept, LEVELS - 1 - n, GEOMETRY)
    if FIRST <= STEPS - 2 and STEPS - 2 < END and GEOMETRY.options.rerank:
        if GEOMETRY.streams:
            score_far_kept(item, kept, GEOMETRY, TILING)
        else:
            score_kept(item, kept, GEOMETRY, TILING)
        if STEPS == END:
            grid_barrier(item.scratch.arrivals, LEVELS + 1, TILING)
    if STEPS == END:
        if tl.program_id(0) % TILING.search_programs == 0:
            out = selected_blocks(indices, item_id, GEOMETRY)
            wanted = GEOMETRY.spec.max_selected
            if head_blocks is not None:
                wanted = tl.load(head_blocks + item_id.head)
            choose_in_runs(item, kept, wanted, out, GEOMETRY)
