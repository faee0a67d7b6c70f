"""Inputs that a selection has work with: Gaussian noise with planted topics.

Each stretch of keys shares a topic direction, and each stretch of queries looks for a few topics of
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
"""Size of a topic direction in each channel; the noise has size 1."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Heads of one attention layer; the default is that of Llama-3.1-8B."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Inputs:
    """q `[num_queries, num_q_heads, head_dim]`; k, v `[kv_len, num_kv_heads, head_dim]`."""

    q: Tensor
    k: Tensor
    v: Tensor


def make_prefill(
    shape: LayerShape, length: int, dtype: torch.dtype, kv_heads: int = 1, seed: int = 0
) -> Inputs:
    """Some GQA groups of a layer: their q, and their k and v strided as in the whole layer."""
    g = torch.Generator().manual_seed(seed)
    topics = _topics(length, kv_heads, shape.head_dim, g)
    layer = (length, shape.num_kv_heads, shape.head_dim)
    k, v = (torch.empty(layer, dtype=dtype)[:, :kv_heads] for _ in range(2))
    k.copy_(_keys(topics, length, g))
    v.copy_(torch.randn(v.shape, generator=g))
    q = _queries(topics, torch.arange(length), shape.group_size, g)
    return Inputs(q.to(dtype), k, v)


def make_decode(
    shape: LayerShape, length: int, num_queries: int, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """A whole layer and the queries of many steps at its end, each looking for other topics."""
    g = torch.Generator().manual_seed(seed)
    topics = _topics(length, shape.num_kv_heads, shape.head_dim, g)
    k = _keys(topics, length, g).to(dtype)
    v = torch.randn(k.shape, generator=g).to(dtype)
    last = torch.tensor([length - 1])
    steps = [_queries(topics, last, shape.group_size, g) for _ in range(num_queries)]
    return Inputs(torch.cat(steps).to(dtype), k, v)


def on_grid(x: Tensor) -> Tensor:
    """`x` `[rows, heads, head_dim]` in quarters below 4: dot products are exact in float32."""
    return (x.float() * 4).round().clamp(-15, 15).div(4).to(x.dtype)


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
