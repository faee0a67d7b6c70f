"""What the programs of one query block and group of heads start from."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class ItemId(NamedTuple):
    """Which query block and group of heads a program works for."""

    row: Any
    """Its row of scratch memory."""
    block: Any
    head: Any


class Item(NamedTuple):
    """What its programs read and write."""

    queries: Any
    """`Queries`."""
    keys: Any
    bounds: Any
    """`PagedRows`, both."""
    scratch: Any
    """`Scratch`."""
    begin: Any
    end: Any
    """The positions [begin, end) are searched."""


@triton.jit
def program_item(num_blocks, PROGRAMS: tl.constexpr, GEOMETRY: tl.constexpr):
    """The `ItemId` of this program; the PROGRAMS that share one follow each other.

    One head after the other, as its query blocks read the same keys; the last blocks, which see the
    most keys, come first.
    """
    row = tl.program_id(0) // PROGRAMS
    count = tl.num_programs(0) // (PROGRAMS * GEOMETRY.heads)
    return ItemId(row, num_blocks - 1 - row % count, row // count)


@triton.jit
def wants_refresh(refresh, block):
    """The query block selects again: always, or as a flag on the device says."""
    wants = True
    if refresh is not None:
        wants = tl.load(refresh + block) != 0
    return wants


@triton.jit
def selected_blocks(indices, item_id, GEOMETRY: tl.constexpr):
    """Pointer to where the chosen blocks go, `max_selected` int32."""
    list_id = item_id.block.to(tl.int64) * GEOMETRY.heads + item_id.head
    return indices + list_id * GEOMETRY.spec.max_selected
