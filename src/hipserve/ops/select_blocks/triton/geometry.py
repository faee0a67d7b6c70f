"""What a search is, whatever the launch: levels, candidates, sizes of lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hipserve.ops._triton.constants import HashedOnce
from hipserve.ops._triton.rows import Heads
from hipserve.ops._triton.tiles import power_of_2
from hipserve.ops.select_blocks.spec import SearchSpec
from hipserve.plan import bound_levels, bound_offsets, kept_runs


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


@dataclass(frozen=True, kw_only=True)
class Geometry(Heads):
    """What a search is.

    Lists with one entry a bound level have the finest first. All sizes but `kept` are powers of
    two.

    Attributes:
        spec: what a user chose.
        lengths: keys of a run of each level.
        offsets: where the runs of each level start in a page, and where the last one ends.
        candidates: most runs that are scored, of each level.
        kept: runs that are kept, of each level.
        blocks: most key blocks that the re-rank scores.
        beam: most nodes that the tree keeps.
        score_size: entries of the longest list of scores.
        list_size: entries of the longest list of runs, nodes or blocks.
        steps: steps of a search: each scores what the one before it kept; the last one chooses.
    """

    __hash__ = HashedOnce.__hash__
    spec: SearchSpec
    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    candidates: tuple[int, ...]
    kept: tuple[int, ...]
    blocks: int
    beam: int
    score_size: int
    list_size: int
    steps: int

    @property
    def levels(self) -> int:
        """Bound levels: 0 for a search by the tree only."""
        return len(self.lengths)

    @property
    def ratio(self) -> int:
        """Fine runs in a coarse one."""
        return self.lengths[-1] // self.lengths[0]


def make_geometry(call: Call, spec: SearchSpec) -> Geometry:
    """What the search of a call is."""
    _, num_q_heads, head_dim = call.q_shape
    _, page_size, kv_heads, _ = call.k_shape
    sizes = (page_size, spec.bound_block_size, call.num_runs)
    lengths = bound_levels(*sizes) if spec.uses_bounds else ()
    kept = kept_runs(ranked_keys(spec), lengths) if lengths else ()
    candidates = tuple(map(power_of_2, count_candidates(lengths, kept, call.longest)))
    blocks = power_of_2(max(ranked_keys(spec) // spec.key_block_size, 1))
    beam = power_of_2(max(spec.budget // spec.key_block_size, 1))
    return Geometry(
        group_size=num_q_heads // call.heads,
        heads=call.heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dim=power_of_2(head_dim),
        spec=spec,
        lengths=lengths,
        offsets=bound_offsets(*sizes),
        candidates=candidates,
        kept=kept,
        blocks=blocks,
        beam=beam,
        score_size=max([*candidates, blocks, 2 * beam]),
        list_size=power_of_2(max([*kept, blocks, beam, spec.max_selected])),
        steps=len(lengths) + (2 if lengths and spec.rerank else 1),
    )


def ranked_keys(spec: SearchSpec) -> int:
    """Keys that the bounds leave to the re-rank."""
    return spec.budget * max(spec.rerank, 1)


def count_candidates(
    lengths: tuple[int, ...], kept: tuple[int, ...], longest: int
) -> tuple[int, ...]:
    """Most runs that are scored, of each level: all of the coarsest, then children."""
    counts = [power_of_2(max(longest // length, 1)) for length in lengths[-1:]]
    if len(lengths) > 1:
        ratio = lengths[1] // lengths[0]
        counts.insert(0, ratio * (kept[1] + 2))  # what parents leave at both ends
    return tuple(counts)
