"""How far the keys that matter lie together."""

from __future__ import annotations

import torch
from torch import Tensor

MASS = 0.9
"""Share of the attention of a row to the keys that are searched: what `waste` collects."""


def intraclass(scores: Tensor, size: int) -> float:
    """The share of the variance of scores that lies between blocks of `size` keys.

    1 where all keys of a block score alike, 1 / `size` where neighbours have nothing in common.

    scores: `[rows, keys]`.
    """
    blocks = _blocks(scores.double(), size)
    between = blocks.mean(-1).var(1, correction=0).sum()
    return float(between / blocks.flatten(1).var(1, correction=0).sum())


def waste(scores: Tensor, size: int) -> float:
    """How many times as many keys blocks of `size` keys read as single keys, for the same mass.

    For `MASS` of each row's attention, over all rows: 1 where keys that matter fill whole blocks,
    `size` where each lies in a block of its own.

    scores: `[rows, keys]`.
    """
    keys = _blocks(scores, size).flatten(1).softmax(-1)
    blocks = keys.unflatten(1, (-1, size)).sum(-1)
    return float(_needed(blocks).sum() * size / _needed(keys).sum())


def unread(scores: Tensor, begin: Tensor, ends: Tensor, size: int, blocks: int) -> float:
    """The share of all attention that the best blocks leave out, mean over rows.

    Keys before `begin` and from `ends` on are read anyway. The best blocks have the most mass.

    Args:
        scores: `[rows, keys]`, -inf where a row sees no key.
        begin: `[]` or `[rows]` int64, where the searched keys of each row begin.
        ends: `[rows]` int64, where they end.
        size: keys of a block.
        blocks: how many are read.
    """
    at = torch.arange(scores.shape[1], device=scores.device)
    searched = (at >= begin) & (at < ends[:, None])
    mass = scores.softmax(-1) * searched
    by_block = _blocks(mass, size).sum(-1)
    best = by_block.topk(min(blocks, by_block.shape[1]), dim=1).values
    return float((mass.sum(1) - best.sum(1)).clamp(min=0).mean())


def _blocks(values: Tensor, size: int) -> Tensor:
    return values[:, : values.shape[1] // size * size].unflatten(1, (-1, size))


def _needed(mass: Tensor) -> Tensor:
    """`[rows]`: the fewest entries of `[rows, entries]` that hold `MASS` of each row."""
    sums = mass.double().sort(dim=1, descending=True).values.cumsum(1)
    return (sums < MASS * sums[:, -1:]).sum(1) + 1
