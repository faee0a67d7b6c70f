"""Sizes of a launch, from shapes only: a captured launch stays valid."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hipserve.ops._triton.constants import HashedOnce
from hipserve.ops._triton.rows import Heads
from hipserve.ops._triton.tiles import power_of_2
from hipserve.platform import chains_launches, gpu_shared_memory

RUN = 16
"""Keys that are turned, or copied by the copy engine, at a time."""
MAX_ROWS = 256
FEWER_ROWS = 128
"""More rows beside keys in fp8, or keys of two origins, would spill registers."""
WIDE_BYTES = 200_000
"""Shared memory of a Hopper GPU: room for 256 rows and two stages of 64 keys, or 128 and 128."""
PROGRAMS = 384
"""Fewer programs than this leave a large GPU idle: their keys are split."""
DENSE_PROGRAMS = 512
"""The same for the few rows (up to three with 8 KV heads) that read everything."""
SMALL_PROGRAMS = 832
"""The same for small programs, of one warp and 32 keys at a time."""
FEW_SPLITS = 16
MAX_SPLITS = 64


class Call(NamedTuple):
    """What the sizes of a launch follow from."""

    q_shape: torch.Size
    k_shape: torch.Size
    longest: int
    """Keys that a row of the block table holds."""
    blocks: int
    """Query blocks."""
    selected: torch.Size | None
    """Shape of `indices`."""
    max_rows: int
    """Rows of the largest query block."""
    num_sink_tokens: int
    key_block_size: int
    windowed: bool
    capped: bool
    same_strides: bool
    tiled: bool
    streams: bool
    converted: bool
    """Pages are in fp8, and keys and values become numbers like those of queries in registers."""
    element_size: int
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Geometry(Heads):
    """What is read, whatever the launch.

    Attributes:
        num_sink_tokens: keys at the start of a sequence that every block reads.
        key_block_size: keys of a chosen block.
        max_selected: entries of a list of chosen blocks.
        selected: blocks are chosen; otherwise everything is read.
        windowed: only the last `sliding_window` keys are read.
        capped: scores are capped by `softcap`.
        same_strides: keys and values lie at the same offsets.
        tiled: keys and values are in tiles that lists name.
        streams: sinks and chosen keys are turned before, as `turned.py` says.
    """

    __hash__ = HashedOnce.__hash__
    num_sink_tokens: int
    key_block_size: int
    max_selected: int
    selected: bool
    windowed: bool
    capped: bool
    same_strides: bool
    tiled: bool = False
    streams: bool = False

    @property
    def room(self) -> int:
        """Sinks and chosen keys of a list, at most, in whole runs of RUN keys."""
        keys = self.num_sink_tokens + self.max_selected * self.key_block_size
        return -(-keys // RUN) * RUN


@dataclass(frozen=True, kw_only=True)
class Tiling(HashedOnce):
    """How a launch divides it.

    Attributes:
        rows: stacked query rows of a tile.
        keys: keys of a tile.
        row_tiles: tiles of the largest query block.
        splits: parts of each key list; `merge_kernel` joins more than one.
        num_warps: warps of a program.
        num_stages: depth of the pipeline that loads keys.
        chained: a kernel may start while the one before it ends.
    """

    __hash__ = HashedOnce.__hash__
    rows: int
    keys: int
    row_tiles: int
    splits: int
    num_warps: int
    num_stages: int
    chained: bool


class Plan(NamedTuple):
    """What the kernels of a call are compiled for."""

    geometry: Geometry
    tiling: Tiling


class TileSize(NamedTuple):
    """Stacked query rows and keys of a tile."""

    rows: int
    keys: int


@functools.lru_cache(1024)
def plan(call: Call) -> Plan:
    """What the kernels of a call are compiled for, and how they are launched."""
    geometry = make_geometry(call)
    return Plan(geometry, make_tiling(call, geometry))


def make_geometry(call: Call) -> Geometry:
    """What a call reads."""
    _, num_q_heads, head_dim = call.q_shape
    kv_heads = call.k_shape[2]
    heads = max(call.selected[1] if call.selected else 0, kv_heads)
    return Geometry(
        group_size=num_q_heads // heads,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dim=power_of_2(head_dim),
        num_sink_tokens=call.num_sink_tokens,
        key_block_size=call.key_block_size,
        max_selected=call.selected[2] if call.selected else 0,
        selected=call.selected is not None,
        windowed=call.windowed,
        capped=call.capped,
        same_strides=call.same_strides,
        tiled=call.tiled,
        streams=call.streams,
    )


def make_tiling(call: Call, geometry: Geometry) -> Tiling:
    """Tiles, splits and launch options of a call."""
    stacked = call.max_rows * geometry.group_size
    half = call.element_size == 2
    most, keys = largest_tile(geometry.dim, half, gpu_shared_memory(call.device))
    rows = max(min(most, power_of_2(stacked)), 16)
    rows = min(rows, FEWER_ROWS) if call.converted or call.streams else rows
    if most == MAX_ROWS and rows == 128:
        keys = 128
    splits, small = 1, False
    if call.max_rows == 1:
        few = call.blocks * geometry.heads
        small = has_small_programs(call, geometry)
        keys = 32 if small else keys
        most_splits = SMALL_PROGRAMS // few if small else large_splits(call, geometry)
        splits = max(min(most_splits, call.longest // keys, MAX_SPLITS), 1)
    num_warps, num_stages = launch_options(TileSize(rows, keys), geometry.dim, splits, small)
    return Tiling(
        rows=rows,
        keys=keys,
        row_tiles=-(-stacked // rows),
        splits=splits,
        num_warps=num_warps,
        num_stages=num_stages,
        chained=chains_launches(call.device),
    )


def large_splits(call: Call, geometry: Geometry) -> int:
    """Splits that fill a GPU with programs of the usual size, for single rows."""
    programs = call.blocks * geometry.heads
    if not geometry.selected and DENSE_PROGRAMS // programs > FEW_SPLITS:
        return DENSE_PROGRAMS // programs
    return PROGRAMS // programs


def has_small_programs(call: Call, geometry: Geometry) -> bool:
    """Selected keys of a few single rows: programs of one warp are the fastest."""
    narrow = call.element_size == 2 and geometry.dim <= 128
    return narrow and geometry.selected and 1 < large_splits(call, geometry) <= FEW_SPLITS


def largest_tile(dim: int, half: bool, shared: int) -> TileSize:
    """Maximum rows of a tile, and its keys: accumulators fit registers and keys the memory."""
    if dim <= 128:
        most = MAX_ROWS if shared >= WIDE_BYTES else MAX_ROWS // 4
        return TileSize(most, 64) if half else TileSize(max(most // 2, MAX_ROWS // 4), 32)
    if half:
        return TileSize(MAX_ROWS // 4 if dim == 256 else 32, 32)
    return TileSize(32 if dim == 256 else 16, 16)


class LaunchOptions(NamedTuple):
    """Warps of a program, and depth of the pipeline that loads keys."""

    num_warps: int
    num_stages: int


def launch_options(tile: TileSize, dim: int, splits: int, small: bool) -> LaunchOptions:
    """Warps and pipeline depth, as measured on an H200 and an H100 (docs/gpu.md).

    A small program has one warp.
    """
    if dim > 256:  # not measured: the first that fits every GPU and spills nothing
        one = splits > 1 or tile.keys == 16
        return LaunchOptions(num_warps=4 if splits > 1 else 8, num_stages=1 if one else 2)
    if small:
        return LaunchOptions(num_warps=1, num_stages=2)
    if splits > 1:  # the more splits, the fewer tiles there are in each
        return LaunchOptions(num_warps=2, num_stages=1 if splits > FEW_SPLITS else 2)
    if tile.rows >= 128:
        return LaunchOptions(num_warps=tile.rows // 16, num_stages=2)
    return LaunchOptions(num_warps=8 if tile.rows * dim > 8192 else 4, num_stages=3)
