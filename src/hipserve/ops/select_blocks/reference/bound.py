"""The descent through summaries of runs of keys, their center and radius, coarse levels first."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hipserve.ops.rope import segment_length
from hipserve.ops.select_blocks.reference.search import Search, first_of, top
from hipserve.plan.runs import bound_levels, bound_offsets, kept_runs, levels_within
from hipserve.selectors import Bound


class BoundSearch(Search):
    """Keeps the best runs of every level, then the best blocks in the finest of them."""

    @property
    def options(self) -> Bound:
        assert isinstance(self.spec.selector, Bound)
        return self.spec.selector

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Keys of a page, keys of a fine run, and runs of a page that have a summary."""
        index = self.seen.keys.index
        assert self.spec.run_size is not None
        return index.page_size, self.spec.run_size, index.num_runs

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Keys of a run of each level."""
        lengths = bound_levels(*self.sizes)
        if self.spec.trained_length is None:
            return lengths
        # A long run of several segments would lie in none.
        return levels_within(lengths, segment_length(self.spec.trained_length))

    def select(self) -> Tensor:
        runs = self.fine_runs()
        per_run = self.lengths[0] // self.spec.key_block_size
        inside = torch.arange(per_run, device=runs.device)
        blocks = (runs[..., None] * per_run + inside).flatten(1)
        if not self.options.rerank:
            return blocks
        best = self.block_scores(blocks).sort(dim=1, descending=True, stable=True).indices
        return first_of(blocks.gather(1, best), self.head_blocks)

    def fine_runs(self) -> Tensor:
        """The best runs of the finest level, `[heads, count]`."""
        counts = kept_runs(self.spec.budget * max(self.options.rerank, 1), self.lengths)
        coarsest = len(self.lengths) - 1
        runs = self.every_run(coarsest)
        for level in range(coarsest, -1, -1):
            if level < coarsest:
                runs = self.candidates(runs, level)
            runs = runs.gather(1, top(self.run_scores(runs, level), counts[level]))
        return runs

    def every_run(self, level: int) -> Tensor:
        """All runs of a level that lie in what is searched, `[heads, count]`."""
        begin = -(-self.begin // self.lengths[level])
        end = max(begin, self.end // self.lengths[level])
        every = torch.arange(begin, end, device=self.rows.device)
        return every.expand(self.rows.shape[0], -1)

    def candidates(self, kept: Tensor, level: int) -> Tensor:
        """Children of the `kept` runs `[heads, count]`, and runs without a parent that is searched.

        The parents are runs of the next level, those that lie wholly in what is searched.
        """
        parent, every = self.lengths[level + 1], self.every_run(level)
        ratio = parent // self.lengths[level]
        low, high = -(-self.begin // parent) * ratio, self.end // parent * ratio
        edge = every[:, (every[0] < low) | (every[0] >= high)]
        children = kept[..., None] * ratio + torch.arange(ratio, device=kept.device)
        return torch.cat([children.flatten(1), edge], dim=1).sort(dim=1).values

    def run_scores(self, runs: Tensor, level: int) -> Tensor:
        """`[heads, count]`: a score of each run, max over the rows, from its summary."""
        length, reach = self.lengths[level], self.options.bound_reach
        first = runs * length
        page, slot = self.seen.keys.locate(first + length - 1)  # a run lies with its last key
        run = bound_offsets(*self.sizes)[level] + slot // length
        scores = self.seen.each(first, lambda scores: scores.of_runs(page, run, reach))
        return (scores - self.baseline).amax(dim=1)
