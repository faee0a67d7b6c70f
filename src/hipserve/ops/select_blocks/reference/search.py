"""What the search of one query block shares, whatever the selector."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.select_blocks.reference.scores import SeenKeys
from hipserve.ops.select_blocks.spec import SearchSpec


class Search:
    """The search of one query block, all heads at once; a selector is a subclass with `select`.

    Searched are the positions [begin, end). `rows` is `[heads, rows, head_dim]`; sets of blocks
    and runs are `[heads, count]` index tensors.
    """

    def __init__(
        self,
        seen: SeenKeys,
        window_start: int,
        position: int,
        spec: SearchSpec,
        head_blocks: Tensor | None = None,
    ) -> None:
        """The first row of `seen` is at `position`; head_blocks `[heads]` as in `SearchInputs`."""
        self.rows, self.seen, self.spec = seen.rows, seen, spec
        every = torch.full(seen.rows.shape[:1], spec.max_selected, device=seen.rows.device)
        self.head_blocks = every if head_blocks is None else head_blocks
        self.begin, self.end = spec.num_sink_tokens, window_start
        self.baseline = self.best_read(position) if spec.relative_scores else 0.0

    def select(self) -> Tensor:
        """The chosen key blocks, `[heads, count]` ascending, then -1; at most `max_selected`."""
        raise NotImplementedError

    def best_read(self, position: int) -> Tensor:
        """`[heads, rows, 1]`: a row's highest score among sinks and what all see of the window."""
        device = self.rows.device
        sinks = torch.arange(self.begin, device=device)
        keys = torch.cat([sinks, torch.arange(self.end, position + 1, device=device)])
        keys = keys.expand(self.rows.shape[0], -1)
        return self.seen.each(keys, lambda scores: scores.of_keys(keys)).amax(dim=2, keepdim=True)

    def block_scores(self, blocks: Tensor) -> Tensor:
        """`[heads, count]`: the highest score of any row and any key of each block."""
        size = self.spec.key_block_size
        blocks = blocks.clamp(self.begin // size, self.end // size - 1)
        first = (blocks * size)[..., None].expand(-1, -1, size)
        keys = (first + torch.arange(size, device=blocks.device)).flatten(1)
        scores = self.seen.each(first.flatten(1), lambda scores: scores.of_keys(keys))
        return (scores - self.baseline).unflatten(2, (-1, size)).amax(dim=(1, 3))


def first_of(ranked: Tensor, counts: Tensor) -> Tensor:
    """The first `counts[h]` of the blocks `[heads, n]` of each head, ascending, then -1."""
    count = int(counts.max())
    beyond = torch.arange(ranked.shape[1], device=ranked.device) >= counts[:, None]
    last = torch.iinfo(ranked.dtype).max
    chosen = ranked.masked_fill(beyond, last).sort(dim=1).values[:, :count]
    return chosen.masked_fill(chosen == last, -1)


def sample_rows(q: Tensor, heads: int, stride: int) -> Tensor:
    """`[rows, num_q_heads, head_dim]` to `[heads, sampled rows x group, head_dim]`."""
    rows = q.flip(0)[::stride].flip(0)
    return rows.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of `[heads, n]`, ascending; ties go to the lower index."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values
