"""The definition of block selection: eager torch, one query block at a time, any device.

The tree is section 3 of arXiv 2406.09827; the descent goes through summaries of runs of keys, their
mean and deviation. Every key of the searched middle is visible to every row of the block, so no
score is ever masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.select_blocks.spec import SearchSpec
from hipserve.plan.runs import bound_levels, bound_offsets, kept_runs


def select_blocks(
    q: Tensor,
    codes: Tensor,
    summaries: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    spec: SearchSpec,
) -> Tensor:
    """See `hipserve.ops.select_blocks`; returns `indices`."""
    shape = spec.selection_shape(q, codes, query_blocks)
    indices = torch.full(shape, -1, dtype=torch.int32, device=q.device)
    starts: list[int] = window_starts.tolist()
    for i, (seq, row, num_rows, position) in enumerate(query_blocks.tolist()):
        if starts[i] > spec.num_sink_tokens:
            rows = sample_rows(q[row : row + num_rows], shape[1], spec.query_stride)
            pages = block_table[seq].long()
            search = Search(rows, codes, summaries, pages, starts[i], position, spec)
            chosen = search.select()
            indices[i, :, : chosen.shape[1]] = chosen.int()
    return indices


def sample_rows(q: Tensor, heads: int, stride: int) -> Tensor:
    """`[rows, num_q_heads, head_dim]` to `[heads, sampled rows x group, head_dim]`."""
    rows = q.flip(0)[::stride].flip(0)
    return rows.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)


class Search:
    """The search of one query block, all heads at once.

    `rows` is `[heads, rows, head_dim]`; block and run sets are `[heads, count]` index tensors.
    """

    def __init__(
        self,
        rows: Tensor,
        codes: Tensor,
        summaries: Tensor | None,
        pages: Tensor,
        window_start: int,
        position: int,
        spec: SearchSpec,
    ) -> None:
        self.rows, self.dtype = rows if rows.dtype == torch.float64 else rows.float(), rows.dtype
        self.codes, self.summaries, self.pages = codes, summaries, pages
        self.begin, self.end = spec.num_sink_tokens, window_start
        self.spec = spec
        group = rows.shape[0] // codes.shape[2]
        self.kv_heads = torch.arange(rows.shape[0], device=rows.device)[:, None] // group
        self.baseline = self.best_read(position) if spec.relative_scores else 0.0

    def best_read(self, position: int) -> Tensor:
        """`[heads, rows, 1]`: a row's highest score among sinks and what all see of the window."""
        device = self.rows.device
        sinks = torch.arange(self.begin, device=device)
        keys = torch.cat([sinks, torch.arange(self.end, position + 1, device=device)])
        return self.scores(keys.expand(self.rows.shape[0], -1)).amax(dim=2, keepdim=True)

    def scores(self, keys: Tensor) -> Tensor:
        """`[heads, rows, count]`: q.k of each row with `keys` `[heads, count]`."""
        page, slot = self.locate(keys, self.codes.shape[1])
        return self.rows @ self.codes[page, slot, self.kv_heads].to(self.rows.dtype).mT

    def select(self) -> Tensor:
        """The chosen key blocks, `[heads, count]` ascending."""
        budget = self.spec.budget
        return self.by_bounds(budget) if self.spec.uses_bounds else self.by_tree(budget)

    # The paper's tree: a beam over a binary tree of key-block ranges.

    def by_tree(self, budget: int) -> Tensor:
        beam = budget // self.spec.key_block_size
        first = self.begin // self.spec.key_block_size
        count = self.end // self.spec.key_block_size - first
        edges = first + torch.arange(beam + 1, device=self.rows.device) * count // beam
        edges = edges.expand(self.rows.shape[0], -1)
        left, right = edges[:, :-1], edges[:, 1:]
        while bool((right - left > 1).any()):
            middle = (left + right) // 2
            left, right = interleave(left, middle), interleave(middle, right)
            scores = self.block_scores(self.representative(left, right))
            kept = top(scores.masked_fill(left == right, -torch.inf), beam)
            left, right = left.gather(1, kept), right.gather(1, kept)
        return left

    def representative(self, left: Tensor, right: Tensor) -> Tensor:
        if self.spec.representative == "random":
            return left + mix(left, right, self.spec.seed) % (right - left).clamp(min=1)
        return {"first": left, "last": right - 1}.get(self.spec.representative, (left + right) // 2)

    def block_scores(self, blocks: Tensor) -> Tensor:
        """`[heads, count]`: the highest score of any row and any key of each block."""
        size = self.spec.key_block_size
        blocks = blocks.clamp(self.begin // size, self.end // size - 1)
        keys = blocks[..., None] * size + torch.arange(size, device=blocks.device)
        scores = self.scores(keys.flatten(1)) - self.baseline
        return scores.unflatten(2, (-1, size)).amax(dim=(1, 3))

    # The descent through summaries of runs, coarse levels first.

    def by_bounds(self, budget: int) -> Tensor:
        spec = self.spec
        assert self.summaries is not None
        num_runs = self.summaries.shape[1]
        lengths = bound_levels(self.codes.shape[1], spec.bound_block_size, num_runs)
        counts = kept_runs(budget * max(spec.rerank, 1), lengths)
        runs, parent = None, None
        for level in reversed(range(len(lengths))):
            length = lengths[level]
            candidates = self.candidates(runs, parent, length)
            runs = candidates.gather(1, top(self.run_scores(candidates, level), counts[level]))
            parent = length
        assert runs is not None
        per_run = spec.bound_block_size // spec.key_block_size
        inside = torch.arange(per_run, device=runs.device)
        blocks = (runs[..., None] * per_run + inside).flatten(1)
        if spec.rerank:
            best = top(self.block_scores(blocks), budget // spec.key_block_size)
            blocks = blocks.gather(1, best)
        return blocks

    def candidates(self, kept: Tensor | None, parent: int | None, length: int) -> Tensor:
        """Runs to score: children of the kept ones, and those whose parent leaves the middle."""
        begin = -(-self.begin // length)
        end = max(begin, self.end // length)
        every = torch.arange(begin, end, device=self.rows.device).expand(self.rows.shape[0], -1)
        if kept is None or parent is None:
            return every
        ratio = parent // length
        low, high = -(-self.begin // parent) * ratio, self.end // parent * ratio
        edge = every[:, (every[0] < low) | (every[0] >= high)]
        children = kept[..., None] * ratio + torch.arange(ratio, device=kept.device)
        return torch.cat([children.flatten(1), edge], dim=1).sort(dim=1).values

    def run_scores(self, runs: Tensor, level: int) -> Tensor:
        """`[heads, count]`: a score of each run, max over the rows, from its summary.

        q.mean + bound_reach * |q|.deviation: what a key scores that lies so many deviations from
        the mean in every channel, on the side that is good for q. The rows are weighted in their
        own dtype.
        """
        assert self.summaries is not None
        page_size, size = self.codes.shape[1], self.spec.bound_block_size
        length = bound_levels(page_size, size, self.summaries.shape[1])[level]
        page, slot = self.locate(runs * length, page_size)
        place = bound_offsets(page_size, size)[level] + slot // length
        mean, deviation = self.summaries[page, place, self.kv_heads].to(self.rows.dtype).unbind(2)
        reached = (self.spec.bound_reach * self.rows.abs()).to(self.dtype).to(self.rows.dtype)
        scores = self.rows @ mean.mT + reached @ deviation.mT
        return (scores - self.baseline).amax(dim=1)

    def locate(self, keys: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
        return self.pages[keys // page_size], keys % page_size


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest along axis 1, ascending; ties go to the lower index."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def interleave(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], dim=2).flatten(1)


def mix(left: Tensor, right: Tensor, seed: int) -> Tensor:
    """A 31-bit hash of a range: the random representative needs no state and no order."""
    x = (left * 0x9E3779B1 + right * 0x85EBCA77 + seed * 0xC2B2AE3D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return (x ^ (x >> 15)) & 0x7FFFFFFF
