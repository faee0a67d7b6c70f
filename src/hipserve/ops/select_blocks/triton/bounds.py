"""The descent through bounds: from the coarsest runs to the finest."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops.select_blocks.triton.run_score import (
    load_run_queries,
    load_summaries,
    score_runs,
)
from hipserve.ops.select_blocks.triton.scratch import level_runs, level_scores
from hipserve.ops.select_blocks.triton.threshold import keep_best


class Candidates(NamedTuple):
    """The runs of a level that are scored: some before, the children of kept parents, some behind.

    Parents lie wholly in what is searched; the fine runs at both ends have none.
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
    RATIO: tl.constexpr = GEOMETRY.ratio
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
    parent = tl.load(parents + (c - before) // RATIO, mask=inner, other=0)
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
    runs = candidate_runs(tl.arange(0, SIZE), parents, candidates, GEOMETRY.ratio)
    tl.store(level_runs(item.scratch, LEVEL) + index, runs, mask=chosen)  # [SIZE]
    tl.debug_barrier()


@triton.jit
def score_level(item, kept, LEVEL: tl.constexpr, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """Scores the candidates of a level by their summaries, with the programs that share them."""
    scores = level_scores(item.scratch, LEVEL)
    candidates = candidates_of(item, kept, LEVEL, GEOMETRY)
    queries = load_run_queries(item.queries, 0, GEOMETRY, TILING)
    RUNS: tl.constexpr = TILING.runs[LEVEL]
    STEP: tl.constexpr = TILING.search_programs * RUNS
    n = candidates.count
    first = tl.program_id(0) % TILING.search_programs * RUNS
    i = tl.arange(0, RUNS)
    at = summaries_of(first + i, item, candidates, LEVEL, GEOMETRY)
    for start in tl.range(first, n, STEP, num_stages=1):
        c = start + i
        summaries = load_summaries(at, item.bounds.strides.side, c < n, GEOMETRY)
        # What is next is looked up while these are on their way.
        at = summaries_of(c + STEP, item, candidates, LEVEL, GEOMETRY)
        best = score_runs(queries, item.queries, summaries, GEOMETRY, TILING)
        tl.store(scores + c, best, mask=c < n)  # [RUNS]


@triton.jit
def summaries_of(c, item, candidates, LEVEL: tl.constexpr, GEOMETRY: tl.constexpr):
    """Pointers to the summaries of the candidates `c` of a level, like it."""
    LENGTH: tl.constexpr = GEOMETRY.lengths[LEVEL]
    bounds = item.bounds
    parents = level_runs(item.scratch, LEVEL + 1)
    key = candidate_runs(c, parents, candidates, GEOMETRY.ratio) * LENGTH
    there = c < candidates.count
    page = tl.load(bounds.table + key // bounds.page_size, mask=there, other=0).to(tl.int64)
    run = GEOMETRY.offsets[LEVEL] + key % bounds.page_size // LENGTH
    return bounds.start + page * bounds.strides.page + run.to(tl.int64) * bounds.strides.run
