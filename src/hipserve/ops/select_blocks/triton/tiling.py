"""How the launches of a search divide it: tiles, and programs that share a query block."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from hipserve.ops._triton.constants import HashedOnce
from hipserve.ops._triton.tiles import power_of_2
from hipserve.ops.select_blocks.spec import SearchSpec
from hipserve.ops.select_blocks.triton.barrier import most_sharers
from hipserve.ops.select_blocks.triton.bound import BoundGeometry
from hipserve.ops.select_blocks.triton.geometry import Call, Geometry, TileSizes
from hipserve.ops.select_blocks.triton.scratch import ScratchSizes, scratch_sizes
from hipserve.ops.select_blocks.triton.tree import TreeGeometry
from hipserve.platform import chains_launches, logger
from hipserve.selectors import Selector

SEARCHES: dict[str, type[Geometry]] = {"tree": TreeGeometry, "bound": BoundGeometry}
"""By the name of the selector."""
MAX_ROWS = 128
PROGRAMS = 384
"""Fewer programs than this leave a large GPU idle: several share a query block and head."""
LONG_LIST = 2**15
"""Lists of so many entries and more take minutes to compile."""


@dataclass(frozen=True, kw_only=True)
class Tiling(HashedOnce):
    """How a launch divides a search.

    Attributes:
        rows: stacked query rows of a tile.
        row_tiles: tiles of the largest query block.
        keys: keys of a tile in the search.
        read_keys: keys of a tile among those that rows read regardless.
        runs: runs of a tile, one entry a level of summaries.
        stages: depth of the pipeline that loads keys.
        baseline_programs: programs of `baseline_kernel` that share a query block and head.
        search_programs: programs of `search_kernel` that do, and wait for each other.
        together: steps of a launch; all of them for single rows, whose time goes into launches and
            what they start with.
        num_warps: warps of a program.
        chained: a kernel may start while the one before it ends.
    """

    __hash__ = HashedOnce.__hash__
    rows: int
    row_tiles: int
    keys: int
    read_keys: int
    runs: tuple[int, ...]
    stages: int
    baseline_programs: int
    search_programs: int
    together: int
    num_warps: int
    chained: bool


class Plan(NamedTuple):
    """What the kernels of a call are compiled for, and the scratch memory they need."""

    geometry: Geometry
    tiling: Tiling
    scratch: ScratchSizes


@functools.lru_cache(1024)
def plan(call: Call, spec: SearchSpec) -> Plan:
    """What the kernels of a call are compiled for, and how they are launched."""
    geometry = SEARCHES[spec.selector.name].of(call, spec)
    announce_long_compilation(geometry, call.k_shape[1])
    tiling = make_tiling(call, geometry)
    return Plan(geometry, tiling, scratch_sizes(geometry, tiling, call.element_size))


def make_tiling(call: Call, geometry: Geometry) -> Tiling:
    """Tiles of a call, and the programs that share its query blocks."""
    spec = geometry.spec
    max_rows = min(spec.query_block_size, call.q_shape[0] - call.blocks + 1)
    stacked = stacked_rows(geometry, max_rows)
    rows = max(min(most_rows(geometry.dim, call.element_size), power_of_2(stacked)), 16)
    row_tiles = -(-stacked // rows)
    tile = tile_keys(geometry.dim, rows, row_tiles)
    if geometry.streams:  # a tile is of one segment
        tile = tile._replace(keys=min(tile.keys, 64), stages=1)
    tile = tile._replace(keys=max(tile.keys, spec.key_block_size))
    few = sharers_of(call, max_rows)
    sharing = geometry.share(call, tile, most=few, few_rows=rows == 16)
    wide = rows > 16 and (geometry.dim > 128 or row_tiles > 1)
    return Tiling(
        rows=rows,
        row_tiles=row_tiles,
        keys=tile.keys,
        read_keys=tile.read_keys,
        runs=sharing.runs,
        stages=tile.stages,
        baseline_programs=min(power_of_2(few // 2 + 1), 8),
        search_programs=sharing.programs,
        together=geometry.steps if max_rows == 1 else 1,
        num_warps=8 if wide else 4,
        chained=chains_launches(call.device),
    )


def sharers_of(call: Call, max_rows: int) -> int:
    """Programs that share a query block and head, at most: of more than single rows 1, 4 or 16, so
    that the same kernels serve chunks of any length."""
    few = max(PROGRAMS // max(call.blocks * call.heads, 1), 1)
    if max_rows > 1:
        few = next((n for n in (1, 4) if n >= few), 16)
    return min(few, most_sharers(call.device))


def stacked_rows(geometry: Geometry, max_rows: int) -> int:
    """Sampled rows of all heads of a group, stacked: those of a whole query block, whose kernels
    serve chunks of any length, unless a tile of 16 holds them."""
    spec, group = geometry.spec, geometry.group_size

    def stacked(rows: int) -> int:
        return ((rows - 1) // spec.query_stride + 1) * group

    return stacked(max_rows if stacked(max_rows) <= 16 else spec.query_block_size)


def most_rows(dim: int, element_size: int) -> int:
    """Rows of a tile, at most: both sides of a box and the rows that meet it share the memory."""
    if dim > 256:
        return 64 // element_size
    return MAX_ROWS if dim <= 128 else MAX_ROWS // 2


def tile_keys(dim: int, rows: int, row_tiles: int) -> TileSizes:
    """Tiles of the search, as `benchmarks/gpu.py tune` found them."""
    if dim > 256:  # not measured: fits every GPU, without spills
        return TileSizes(keys=16, runs=16, read_keys=16, stages=1)
    if dim > 128:
        return TileSizes(keys=32, runs=32, read_keys=32, stages=1)
    if row_tiles > 1:
        return TileSizes(keys=64, runs=64, read_keys=64, stages=1)
    if rows == 16:
        return TileSizes(keys=128, runs=64, read_keys=128, stages=1)
    return TileSizes(keys=128, runs=64, read_keys=32, stages=2)


def announce_long_compilation(geometry: Geometry, page_size: int) -> None:
    """Says why a first call takes minutes."""
    entries = max(geometry.score_size, geometry.list_size)
    if entries >= LONG_LIST:
        warn_of_long_lists(entries, geometry.spec.budget, geometry.spec.selector, page_size)


@functools.cache
def warn_of_long_lists(entries: int, budget: int, selector: Selector, page_size: int) -> None:
    """Warns once for each size."""
    logger.warning(
        "kernels that search lists of %d entries compile for minutes (budget=%d, %s, "
        "pages of %d keys); with some thousand keys in pages of 256 it is seconds",
        entries,
        budget,
        selector,
        page_size,
    )
