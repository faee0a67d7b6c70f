"""The share of attention that rows leave unread, estimated from a few of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.plan import BatchLayout, PruningRule
from hipserve.types import BlockSelection, KeyPool

DRAWS = 32
"""Key blocks that are looked at for a row and head."""
STEPS, BLOCKS = 256, 16
"""A decode row is metered at one position in so many, a row of one query block in so many."""
STRIDE = 37
"""Layers meter different rows, so that no step pays for all of them."""


@dataclass(frozen=True, slots=True)
class Attended:
    """One call of a layer: what its rows read.

    Attributes:
        q: `[num_tokens, num_q_heads, head_dim]`, packed over the sequences.
        lse: `[num_tokens, num_q_heads]`, of the keys that were read.
        pool: pages that hold all keys.
        layout: of the batch.
        selection: what its query blocks read.
        config, rule: with which they were selected.
        sm_scale, softcap: as in `hip_attention`.
    """

    q: Tensor
    lse: Tensor
    pool: KeyPool
    layout: BatchLayout
    selection: BlockSelection
    config: HiPConfig
    rule: PruningRule
    sm_scale: float | None = None
    softcap: float = 0.0

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """`[..., rows, keys]` float32; q `[..., rows, head_dim]`, k `[..., keys, head_dim]`."""
        scale = q.shape[-1] ** -0.5 if self.sm_scale is None else self.sm_scale
        scale *= self.pool.k_scale
        scores = q.float() @ k.float().transpose(-1, -2) * scale
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def keys_at(self, sequence: Tensor, positions: Tensor, kv_head: Tensor) -> Tensor:
        """`[n, heads, keys, head_dim]`: keys of sequences by their positions.

        Args:
            sequence: `[n]` int64.
            positions: `[n, heads, keys]` int64.
            kv_head: `[heads]` int64, which one each reads.
        """
        size = self.pool.page_size
        pages = self.layout.block_table[sequence[:, None, None], positions // size]
        return self.pool.k_cache[pages, positions % size, kv_head[:, None]]


class MeteredRows(NamedTuple):
    """Rows of a step whose query blocks are pruned, each `[n]` int64 on the host.

    Attributes:
        block: query block of each.
        row: in the packed batch.
        sequence: whose page table it reads by.
        position: in its sequence.
    """

    block: Tensor
    row: Tensor
    sequence: Tensor
    position: Tensor


@dataclass(frozen=True, slots=True)
class UnreadMass:
    """What was metered in one layer.

    Attributes:
        total: shares of attention that were left unread, summed over rows and heads.
        count: how many shares, rows times query heads.
    """

    total: float
    count: int

    @property
    def mean(self) -> float:
        """Mean share of a pruned row and head; 0 where none was metered."""
        return self.total / max(self.count, 1)

    def since(self, earlier: UnreadMass) -> UnreadMass:
        """What was metered after `earlier`."""
        return UnreadMass(self.total - earlier.total, self.count - earlier.count)


class Meter:
    """Estimates what the rows of one layer leave unread: an estimate, not a bound.

    A row knows the mass of the keys that it reads, from its log-sum-exp. What lies between sinks
    and window is divided into `DRAWS` stretches; one random key block of each is scored, and those
    of them that the row does not read stand for all unread ones. Rows and blocks are drawn by
    position and layer: the same steps meter the same.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._random = torch.Generator().manual_seed(layer)
        self._total: Tensor | float = 0.0
        self._count = 0

    @property
    def mass(self) -> UnreadMass:
        """What all rows that were metered so far leave unread."""
        return UnreadMass(float(self._total), self._count)

    def measure(self, call: Attended) -> None:
        """Meters a few rows of a call."""
        rows = self.choose(call.layout, call.rule)
        if rows is not None:
            shape = (len(rows.row), call.selection.indices.shape[1], DRAWS)
            self.add(unread_share(call, rows, torch.rand(shape, generator=self._random)), rows)

    def add(self, share: Tensor, rows: MeteredRows) -> None:  # noqa: ARG002
        """Takes what was estimated of some rows: share `[n, num_q_heads]`."""
        self._total = self._total + share.sum(dtype=torch.float64)
        self._count += share.numel()

    def choose(self, layout: BatchLayout, rule: PruningRule) -> MeteredRows | None:
        """The rows to meter; None in most steps."""
        size = rule.query_block_size
        found = [
            (i, first + at, sequence, position + at)
            for i, (sequence, first, count, position) in enumerate(layout.host_blocks(size))
            if (at := self.place(position, count, size)) is not None
            and rule.prunes(position, count)
        ]
        return MeteredRows(*torch.tensor(found).T) if found else None

    def place(self, position: int, count: int, size: int) -> int | None:
        """Which of the `count` rows of a query block at `position` is metered; None for none."""
        turn = STRIDE * self.layer
        if count == 1:
            return None if (position + turn) % STEPS else 0
        return None if (position // size + turn) % BLOCKS else turn % count


def unread_share(call: Attended, rows: MeteredRows, draws: Tensor) -> Tensor:
    """`[n, num_q_heads]` float32: estimates of the share of attention that rows leave unread.

    Args:
        call: what was read.
        rows: n of its rows.
        draws: `[n, heads of the selection, draws]` float32, uniform in [0, 1).
    """
    size, count, device = call.config.key_block_size, draws.shape[-1], call.q.device
    block, row, sequence = (x.to(device) for x in (rows.block, rows.row, rows.sequence))
    indices, first = call.selection.indices[block], call.config.num_sink_tokens // size
    blocks = (call.selection.window_start[block] // size - first)[:, None, None]  # in between
    places = torch.arange(count, device=device) + draws.to(device)
    drawn = first + (places * blocks / count).long().minimum(blocks - 1)  # [n, heads, draws]
    read = (drawn[..., None] == indices[:, :, None]).any(-1)
    at = (drawn[..., None] * size + torch.arange(size, device=device)).flatten(2)
    heads = indices.shape[1]
    kv_head = torch.arange(heads, device=device) * call.pool.num_kv_heads // heads
    own = call.q[row].unflatten(1, (heads, -1))  # [n, heads, query heads that share, head_dim]
    scores = call.scores(own, call.keys_at(sequence, at, kv_head))
    known = read.repeat_interleave(size, -1)[:, :, None]
    unread = scores.masked_fill(known, -torch.inf).logsumexp(-1) + (blocks / count).log()
    return (unread.flatten(1) - call.lse[row]).sigmoid()
