"""Scratch memory: what a query block and head keeps between the steps of its search.

Lists of scores (float32, `score_size` entries) and of runs, nodes or blocks (int32, `list_size`
entries). Memory is shared where one list is read for the last time before the other is written:

| memory | holds |
|---|---|
| score list 0 | scores of odd levels, then of key blocks; or of the nodes of the tree |
| score list 1 | scores of even levels |
| list 0 | kept runs of even levels |
| list 1 | kept runs of odd levels |
| list 2, 3 | left and right edges of the nodes of the tree |

Levels take turns because one level's runs are written while those of its parents are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops.select_blocks.triton.codes import SIDES, QueryCodes

if TYPE_CHECKING:
    from hipserve.ops.select_blocks.triton.geometry import Geometry
    from hipserve.ops.select_blocks.triton.tiling import Tiling

NUM_SCORES = tl.constexpr(2)
NUM_LISTS = tl.constexpr(4)


class ScratchSizes(NamedTuple):
    """Entries of each kind that a query block and head needs, of four bytes each."""

    scores: int
    lists: int
    baselines: int
    arrivals: int
    query_codes: int
    query_scales: int
    turned: int


def scratch_sizes(geometry: Geometry, tiling: Tiling, element_size: int) -> ScratchSizes:
    """What a query block and head needs. Every program that looks for baselines codes rows, and
    every program turns rows for itself."""
    coded = geometry.spec.code_bits < 16
    turning = max(tiling.baseline_programs, tiling.search_programs)
    turned = turning * tiling.rows * geometry.dim * element_size // 4
    coded_rows = tiling.baseline_programs * tiling.rows * tiling.row_tiles if coded else 0
    return ScratchSizes(
        scores=NUM_SCORES.value * geometry.score_size,
        lists=NUM_LISTS.value * geometry.list_size,
        baselines=tiling.baseline_programs * tiling.rows * tiling.row_tiles,
        arrivals=1,
        query_codes=coded_rows * SIDES.value * geometry.query_width // 4,
        query_scales=coded_rows * SIDES.value,
        turned=turned if geometry.streams else 0,
    )


class Scratch(NamedTuple):
    """Pointers to the memory of one query block and head, by what it holds."""

    odd_scores: Any
    even_scores: Any
    block_scores: Any
    node_scores: Any
    even_runs: Any
    odd_runs: Any
    left_edges: Any
    right_edges: Any
    arrivals: Any
    """How often programs came to `grid_barrier`."""


@triton.jit
def scratch_of(scores, lists, arrivals, row, GEOMETRY: tl.constexpr):
    """The `Scratch` of a row of scratch memory."""
    row = row.to(tl.int64)
    scores += row * NUM_SCORES * GEOMETRY.score_size
    lists += row * NUM_LISTS * GEOMETRY.list_size
    size: tl.constexpr = GEOMETRY.list_size
    return Scratch(
        odd_scores=scores,
        even_scores=scores + GEOMETRY.score_size,
        block_scores=scores,
        node_scores=scores,
        even_runs=lists,
        odd_runs=lists + size,
        left_edges=lists + 2 * size,
        right_edges=lists + 3 * size,
        arrivals=arrivals + row,
    )


@triton.jit
def level_scores(scratch, LEVEL: tl.constexpr):
    """Pointer to the scores of the candidates of a level."""
    return scratch.odd_scores if LEVEL % 2 == 1 else scratch.even_scores


@triton.jit
def level_runs(scratch, LEVEL: tl.constexpr):
    """Pointer to the kept runs of a level, ascending."""
    return scratch.odd_runs if LEVEL % 2 == 1 else scratch.even_runs


@triton.jit
def query_codes_of(numbers, scales, row, part, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """The `QueryCodes` that program `part` of a row of scratch memory wrote."""
    ROWS: tl.constexpr = TILING.rows * TILING.row_tiles * SIDES
    first = row * TILING.baseline_programs + part
    return QueryCodes(numbers + first * ROWS * GEOMETRY.query_width, scales + first * ROWS)


@triton.jit
def turned_rows_of(
    turned, row, PROGRAMS: tl.constexpr, GEOMETRY: tl.constexpr, TILING: tl.constexpr
):
    """Pointer to the room for turned rows of this program, one of PROGRAMS that share a row of
    scratch memory."""
    number = row * PROGRAMS + tl.program_id(0) % PROGRAMS
    return turned + number * TILING.rows * GEOMETRY.dim
