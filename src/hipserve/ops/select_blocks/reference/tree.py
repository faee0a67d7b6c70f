"""The paper's tree (arXiv 2406.09827, section 3): a beam over ranges of key blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.select_blocks.reference.search import Search, top
from hipserve.selectors import Tree


class TreeSearch(Search):
    """Halves every range of the beam and keeps the best halves, until each is one block."""

    @property
    def options(self) -> Tree:
        assert isinstance(self.spec.selector, Tree)
        return self.spec.selector

    def select(self) -> Tensor:
        beam = self.spec.max_selected
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
        """The block that stands for each range [left, right), `[heads, count]` as they are."""
        match self.options.representative:
            case "first":
                return left
            case "last":
                return right - 1
            case "middle":
                return (left + right) // 2
            case "random":
                return left + mix(left, right, self.options.seed) % (right - left).clamp(min=1)


def interleave(a: Tensor, b: Tensor) -> Tensor:
    """`[heads, 2 * count]`: a0, b0, a1, b1, ... of two `[heads, count]`."""
    return torch.stack([a, b], dim=2).flatten(1)


def mix(left: Tensor, right: Tensor, seed: int) -> Tensor:
    """A 31-bit hash of each range of `[heads, count]`: a random choice without state or order."""
    x = (left * 0x9E3779B1 + right * 0x85EBCA77 + seed * 0xC2B2AE3D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return (x ^ (x >> 15)) & 0x7FFFFFFF
