"""Query rows: which of them a query block holds, and which heads read the same keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.constants import HashedOnce


@dataclass(frozen=True, kw_only=True)
class Heads(HashedOnce):
    """Heads that read the same keys, and how wide they are.

    Attributes:
        group_size: query heads that share a selection, stacked in a tile.
        heads: selections of a query block, one a group.
        kv_heads: heads of the KV cache; some groups may read the same one.
        head_dim: elements of a head.
        dim: the same, padded to a power of two.
    """

    __hash__ = HashedOnce.__hash__
    group_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dim: int


class RowStrides(NamedTuple):
    """Strides of `q` or `out`, in elements."""

    token: Any
    head: Any


class QueryBlock(NamedTuple):
    """A row of `query_blocks`."""

    seq: Any
    first_row: Any
    num_rows: Any
    position: Any
    """Position of the first row."""


@triton.jit
def load_query_block(query_blocks, block):
    """The `QueryBlock` at `query_blocks[block]`; four int32 scalars, `first_row` widened."""
    seq = tl.load(query_blocks + 4 * block)
    first_row = tl.load(query_blocks + 4 * block + 1).to(tl.int64)
    num_rows = tl.load(query_blocks + 4 * block + 2)
    position = tl.load(query_blocks + 4 * block + 3)
    return QueryBlock(seq, first_row, num_rows, position)


@triton.jit
def load_position(query_blocks, block):
    """Only the position of its first row, int32."""
    return tl.load(query_blocks + 4 * block + 3)


@triton.jit
def kv_head_of(head, HEADS: tl.constexpr):
    """The KV head, int64, that the group `head` of query heads reads."""
    return (head * HEADS.kv_heads // HEADS.heads).to(tl.int64)
