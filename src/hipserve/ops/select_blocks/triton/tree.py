"""The tree of the paper: a beam of nodes, ranges of blocks, halved until each is one block."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from hipserve.ops._triton.constants import HashedOnce
from hipserve.ops._triton.tiles import power_of_2
from hipserve.ops.select_blocks.spec import SearchSpec
from hipserve.ops.select_blocks.triton.geometry import (
    Call,
    Geometry,
    Sharing,
    TileSizes,
    shared_geometry,
)
from hipserve.ops.select_blocks.triton.item import selected_blocks
from hipserve.ops.select_blocks.triton.key_score import key_rows, load_keys, score_blocks
from hipserve.ops.select_blocks.triton.queries import load_queries
from hipserve.ops.select_blocks.triton.threshold import keep_best
from hipserve.selectors import Tree


@dataclass(frozen=True, kw_only=True)
class TreeGeometry(Geometry):
    """What the walk of the tree is.

    Attributes:
        beam: most nodes that are kept, rounded up to a power of two.
    """

    __hash__ = HashedOnce.__hash__
    beam: int

    @property
    def options(self) -> Tree:
        assert isinstance(self.spec.selector, Tree)
        return self.spec.selector

    @classmethod
    def of(cls, call: Call, spec: SearchSpec) -> TreeGeometry:
        beam = power_of_2(spec.max_selected)
        shared = shared_geometry(call, spec)
        return cls(**shared, beam=beam, score_size=2 * beam, list_size=beam, steps=1)

    def share(self, call: Call, tile: TileSizes, *, most: int, few_rows: bool) -> Sharing:  # noqa: ARG002
        """A single program walks the tree: each round waits for the one before it."""
        return Sharing(programs=1)


@triton.jit
def mix(left, right, SEED: tl.constexpr):
    """A hash of the range [left, right), 31 bits; the same as `mix` in `reference/tree.py`.

    h = left * a + right * b + SEED * c, then two rounds of h = (h ^ h >> s) * m, mod 2^32
    """
    LOW: tl.constexpr = 0xFFFFFFFF
    x = left.to(tl.int64) * 0x9E3779B1 + right.to(tl.int64) * 0x85EBCA77
    x = (x + (SEED * 0xC2B2AE3D & LOW)) & LOW
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & LOW
    x = ((x ^ (x >> 12)) * 0x297A2D39) & LOW
    return (x ^ (x >> 15)) & 0x7FFFFFFF


@triton.jit
def halves(c, scratch, n):
    """Left and right edge of the c-th half of `n`: node c // 2, its first or second half."""
    left = tl.load(scratch.left_edges + c // 2, mask=c < n, other=0)  # like c
    right = tl.load(scratch.right_edges + c // 2, mask=c < n, other=0)  # like c
    middle = (left + right) // 2
    return tl.where(c % 2 == 0, left, middle), tl.where(c % 2 == 0, middle, right)


@triton.jit
def representative(left, right, GEOMETRY: tl.constexpr):
    """The block that stands for the range [left, right): first, last, any or the middle one."""
    OPTIONS: tl.constexpr = GEOMETRY.options
    if OPTIONS.representative == "first":
        return left
    elif OPTIONS.representative == "last":
        return right - 1
    elif OPTIONS.representative == "random":
        length = tl.maximum(right - left, 1).to(tl.int64)
        return left + (mix(left, right, OPTIONS.seed) % length).to(tl.int32)
    else:
        return (left + right) // 2


@triton.jit
def divide(scratch, first, count, BEAM: tl.constexpr, GEOMETRY: tl.constexpr):
    """Writes the first nodes: the blocks [first, first + count) in BEAM parts."""
    i = tl.arange(0, GEOMETRY.beam)
    left = (first + i.to(tl.int64) * count // BEAM).to(tl.int32)
    tl.store(scratch.left_edges + i, left, mask=i < BEAM)  # [BEAM]
    right = (first + (i + 1).to(tl.int64) * count // BEAM).to(tl.int32)
    tl.store(scratch.right_edges + i, right, mask=i < BEAM)  # [BEAM]
    tl.debug_barrier()


@triton.jit
def score_halves(
    item, queries, first, end, BEAM: tl.constexpr, GEOMETRY: tl.constexpr, TILING: tl.constexpr
):
    """Scores both halves of all nodes by the keys of their representatives; empty ones get -inf."""
    SIZE: tl.constexpr = GEOMETRY.spec.key_block_size
    BLOCKS: tl.constexpr = TILING.keys // SIZE
    for start in range(0, 2 * BEAM, BLOCKS):
        i = tl.arange(0, TILING.keys)
        c = start + i // SIZE
        left, right = halves(c, item.scratch, 2 * BEAM)
        block = representative(left, right, GEOMETRY)
        block = tl.minimum(tl.maximum(block, first), end - 1)
        positions, there = block * SIZE + i % SIZE, c < 2 * BEAM
        rows = key_rows(item.keys, positions, there, GEOMETRY)
        k_tile = load_keys(rows, there, GEOMETRY)
        best = score_blocks(queries, item.queries, k_tile, positions, there, GEOMETRY, TILING)
        c = start + tl.arange(0, BLOCKS)
        left, right = halves(c, item.scratch, 2 * BEAM)
        best = tl.where(left < right, best, -float("inf"))
        tl.store(item.scratch.node_scores + c, best, mask=c < 2 * BEAM)  # [BLOCKS]
    tl.debug_barrier()


@triton.jit
def keep_halves(scratch, BEAM: tl.constexpr, GEOMETRY: tl.constexpr):
    """Makes the best halves the nodes of the next round, in order."""
    chosen, index = keep_best(scratch.node_scores, 2 * BEAM, BEAM, 2 * GEOMETRY.beam)
    left, right = halves(tl.arange(0, 2 * GEOMETRY.beam), scratch, 2 * BEAM)
    tl.debug_barrier()
    tl.store(scratch.left_edges + index, left, mask=chosen)  # [2 * BEAM]
    tl.store(scratch.right_edges + index, right, mask=chosen)  # [2 * BEAM]
    tl.debug_barrier()


@triton.jit
def search_tree(item, item_id, indices, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """The paper's beam (section 3): writes the chosen blocks, ascending.

    A round halves every node and keeps the best BEAM halves, until no node is longer than a block.
    """
    SIZE: tl.constexpr = GEOMETRY.spec.key_block_size
    BEAM: tl.constexpr = GEOMETRY.spec.max_selected
    first, count = item.begin // SIZE, item.end // SIZE - item.begin // SIZE
    divide(item.scratch, first, count, BEAM, GEOMETRY)
    queries = load_queries(item.queries, 0, 0, GEOMETRY, TILING)
    longest = (count + BEAM - 1) // BEAM
    while longest > 1:
        score_halves(item, queries, first, item.end // SIZE, BEAM, GEOMETRY, TILING)
        keep_halves(item.scratch, BEAM, GEOMETRY)
        longest = (longest + 1) // 2
    i = tl.arange(0, GEOMETRY.list_size)
    chosen = tl.load(item.scratch.left_edges + i, mask=i < BEAM, other=-1)  # [BEAM]
    tl.store(selected_blocks(indices, item_id, GEOMETRY) + i, chosen, mask=i < BEAM)
