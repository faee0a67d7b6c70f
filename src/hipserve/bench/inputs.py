"""Inputs that a selection has work with: Gaussian noise with planted topics.

Each stretch of keys shares a topic direction, and each block of queries looks for a few topics of
its past. Values are Gaussian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOPIC_KEYS = 256
"""Keys of one stretch, and query rows, that share a topic."""

TOPICS_SOUGHT = 3
STRENGTH = 0.5
"""Length of a topic direction per channel, beside noise of 1."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Heads of one attention layer."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Inputs:
    """q `[num_tokens, num_q_heads, head_dim]`; k, v `[kv_len, num_kv_heads, head_dim]`."""

    q: Tensor
    k: Tensor
    v: Tensor


def make_prefill(shape: LayerShape, length: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """One GQA group of a layer: k and v are strided as in the whole layer, q is its group alone."""
    g = torch.Generator().manual_seed(seed)
    topics = _topics(length, 1, shape.head_dim, g)
    k = torch.empty(length, shape.num_kv_heads, shape.head_dim, dtype=dtype)[:, :1]
    v = torch.empty(length, shape.num_kv_heads, shape.head_dim, dtype=dtype)[:, :1]
    k.copy_(_keys(topics, length, g))
    v.copy_(torch.randn(v.shape, generator=g))
    positions = torch.arange(length)
    q = _queries(topics, positions, shape.group_size, g)
    return Inputs(q.to(dtype), k, v)


def make_decode(
    shape: LayerShape, length: int, num_queries: int, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """A whole layer and the queries of many steps at its end, each looking for other topics."""
    g = torch.Generator().manual_seed(seed)
    topics = _topics(length, shape.num_kv_heads, shape.head_dim, g)
    k = _keys(topics, length, g).to(dtype)
    v = torch.randn(k.shape, generator=g).to(dtype)
    positions = torch.full((num_queries,), length - 1)
    q = torch.cat([_queries(topics, p[None], shape.group_size, g) for p in positions])
    return Inputs(q.to(dtype), k, v)


def _topics(length: int, heads: int, dim: int, g: torch.Generator) -> Tensor:
    """`[stretches, heads, dim]`"""
    return torch.randn(-(-length // TOPIC_KEYS), heads, dim, generator=g) * STRENGTH


def _keys(topics: Tensor, length: int, g: torch.Generator) -> Tensor:
    noise = torch.randn(length, *topics.shape[1:], generator=g)
    return noise + topics[torch.arange(length) // TOPIC_KEYS]


def _queries(topics: Tensor, positions: Tensor, group: int, g: torch.Generator) -> Tensor:
    """`[positions, heads x group, dim]`: stretches of positions look for the same few topics."""
    stretches = positions // TOPIC_KEYS
    chance = torch.rand(int(stretches.max()) + 1, TOPICS_SOUGHT, generator=g)
    sought = (chance[stretches] * (stretches[:, None] + 1)).long()
    wanted = topics[sought].sum(dim=1).repeat_interleave(group, dim=1)
    return torch.randn(wanted.shape, generator=g) + wanted
