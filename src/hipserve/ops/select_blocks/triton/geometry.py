"""What a search is, whatever the launch. Each selector adds its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hipserve.ops._triton.constants import HashedOnce
from hipserve.ops._triton.rows import Heads
from hipserve.ops._triton.tiles import power_of_2
from hipserve.ops.codes import REACH_STEPS
from hipserve.ops.rope import segment_length
from hipserve.ops.select_blocks.spec import SearchSpec

LEAST = 32
"""Channels of a product of integers on tensor cores, at least."""


class Call(NamedTuple):
    """What the sizes of a search and of its launches follow from: shapes, no values."""

    q_shape: torch.Size
    k_shape: torch.Size
    num_runs: int
    """Runs whose summaries a page carries."""
    longest: int
    """Keys that a row of the block table holds."""
    blocks: int
    """Query blocks."""
    heads: int
    """Selections of a query block."""
    element_size: int
    device: torch.device


class TileSizes(NamedTuple):
    """Most that a program of the search takes at a time, and its pipeline."""

    keys: int
    runs: int
    read_keys: int
    stages: int


class Sharing(NamedTuple):
    """How the programs of a query block and head divide what they score."""

    programs: int
    """How many of them have something to score, at most."""
    runs: tuple[int, ...] = ()
    """Runs of a tile, one entry a level."""


@dataclass(frozen=True, kw_only=True)
class Geometry(Heads):
    """What a search is; a subclass for every selector.

    Attributes:
        spec: what a user chose.
        score_size: entries of the longest list of scores, a power of two.
        list_size: entries of the longest list of runs, nodes or blocks, a power of two.
        steps: steps of a search: each scores what the one before it kept; the last one chooses.
    """

    __hash__ = HashedOnce.__hash__
    spec: SearchSpec
    score_size: int
    list_size: int
    steps: int

    @property
    def streams(self) -> bool:
        """Query blocks beyond the trained length see far keys nearer."""
        return self.spec.trained_length is not None

    @property
    def segment(self) -> int:
        """Keys that are moved together."""
        return segment_length(self.spec.trained_length or 0)

    @property
    def reach(self) -> float:
        """Radii from its center at which a run is scored."""
        return 0.0

    @property
    def reach_steps(self) -> int:
        """The same in whole steps, for codes."""
        return round(self.reach * REACH_STEPS)

    @property
    def turns_by_matrix(self) -> bool:
        """Query rows are rotated by a product on tensor cores: the matrix fits shared memory."""
        return LEAST <= self.dim <= 128

    @property
    def query_width(self) -> int:
        """Bytes of one side of a coded query row."""
        return max(self.dim, 2 * LEAST)

    @property
    def code_width(self) -> int:
        """Bytes of a key's short code, padded to a power of two."""
        return max(self.dim * self.spec.code_bits // 8, LEAST)

    @property
    def summary_width(self) -> int:
        """Bytes of one side of a coded summary, likewise."""
        return max(self.dim, LEAST)

    @classmethod
    def of(cls, call: Call, spec: SearchSpec) -> Geometry:
        """What the search of a call is."""
        raise NotImplementedError

    def share(self, call: Call, tile: TileSizes, *, most: int, few_rows: bool) -> Sharing:
        """How `most` programs or fewer divide the scores of a search.

        few_rows: the sampled rows fit a tile of 16.
        """
        raise NotImplementedError


def shared_geometry(call: Call, spec: SearchSpec) -> dict[str, Any]:
    """The fields that do not depend on the selector."""
    _, num_q_heads, head_dim = call.q_shape
    return {
        "group_size": num_q_heads // call.heads,
        "heads": call.heads,
        "kv_heads": call.k_shape[2],
        "head_dim": head_dim,
        "dim": power_of_2(head_dim),
        "spec": spec,
    }
