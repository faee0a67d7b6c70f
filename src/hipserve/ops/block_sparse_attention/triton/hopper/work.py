"""Items of work: a query block, two of the heads that share its selection, and what they read."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LANES = gl.constexpr(64)


class Inputs(NamedTuple):
    """Pointers and counts that say what there is to do."""

    block_table: Any
    table_stride: Any
    query_blocks: Any
    indices: Any
    window_start: Any
    num_blocks: Any
    last_block: Any
    """`num_blocks` - 1, which would otherwise be kept in memory."""
    items: Any
    """Items of work, all together."""
    programs: Any
    """Programs that share them."""


class Item(NamedTuple):
    """Numbers of a query block, of a selection in it, and of a pair of heads in its group."""

    block: Any
    head: Any
    pair: Any


class Loaded(NamedTuple):
    """What `Work` follows from, as it lies in memory; loaded an item ahead, used an item later."""

    seq: Any
    first_row: Any
    num_rows: Any
    position: Any
    window_start: Any
    chosen: Any
    """`[LANES]`: entries of the list of chosen blocks, or how many of them there are, by lane."""


class Work(NamedTuple):
    """The list of keys of an item, as `key_list.KeyList` has it, and its query rows.

    Tiles are copied in runs of 16 keys, so the window is read from a multiple of 16 on, and what
    lies before its start is hidden.
    """

    first_row: Any
    num_rows: Any
    sinks: Any
    chosen: Any
    window: Any
    hidden: Any
    """Keys at the start of the window that no row sees."""
    own: Any
    """Where in the list the block's first row finds its own key."""
    end: Any
    """Keys in the list, 0 without query rows."""


@gluon.jit
def item_at(number, inputs, SHAPE: gl.constexpr):
    """The `Item` of that number: the last query blocks, which see the most keys, come first."""
    block = inputs.last_block - number // SHAPE.head_tiles % inputs.num_blocks
    return Item(block, number // SHAPE.head_tiles // inputs.num_blocks, number % SHAPE.head_tiles)


@gluon.jit
def chosen_blocks(item, inputs, SHAPE: gl.constexpr):
    """Pointer to the list of chosen blocks of an item."""
    row = item.block.to(gl.int64) * SHAPE.heads + item.head
    return inputs.indices + row * SHAPE.max_selected


@gluon.jit
def load_work(number, inputs, SHAPE: gl.constexpr):
    """What the item `number` reads, `Loaded`; nothing beyond the last item."""
    layout: gl.constexpr = gl.SliceLayout(
        0, gl.BlockedLayout([1, 2], [1, 32], [gl.num_warps(), 1], [1, 0])
    )
    there = number < inputs.items
    item = item_at(number, inputs, SHAPE)
    row = inputs.query_blocks + 4 * item.block
    seq = gl.load(row, mask=there, other=0)
    first_row = gl.load(row + 1, mask=there, other=0)
    num_rows = gl.load(row + 2, mask=there, other=0)
    position = gl.load(row + 3, mask=there, other=0)
    window_start = 0
    chosen = gl.full([LANES], -1, gl.int32, layout)
    if SHAPE.selected:
        window_start = gl.load(inputs.window_start + item.block, mask=there, other=0)
        chosen = load_chosen(chosen_blocks(item, inputs, SHAPE), there, layout, SHAPE.max_selected)
    return Loaded(seq, first_row, num_rows, position, window_start, chosen)


@gluon.jit
def load_chosen(blocks, there, layout: gl.constexpr, COUNT: gl.constexpr):
    """`[LANES]` int32: a list of up to LANES entries itself, or the entries of a longer one."""
    i = gl.arange(0, LANES, layout)
    entries = gl.load(blocks + i, mask=there & (i < COUNT), other=-1)  # [LANES]
    if COUNT > LANES:
        entries = (entries >= 0).to(gl.int32)
        for first in range(LANES, COUNT, LANES):
            # of the shape [LANES]:
            more = gl.load(blocks + first + i, mask=there & (first + i < COUNT), other=-1)
            entries += (more >= 0).to(gl.int32)
    return entries


@gluon.jit
def make_work(loaded, SHAPE: gl.constexpr):
    """The `Work` of what was `Loaded`."""
    last = loaded.position + loaded.num_rows
    sinks, chosen, window, hidden = 0, 0, 0, 0
    if SHAPE.selected:
        count = loaded.chosen
        if SHAPE.max_selected <= LANES:
            count = (count >= 0).to(gl.int32)
        chosen = gl.sum(count, axis=0) * SHAPE.key_block_size
        sinks = gl.minimum(SHAPE.num_sink_tokens, last)
        start = gl.maximum(gl.minimum(loaded.window_start, last), sinks)
        window = gl.maximum(start // 16 * 16, sinks)
        hidden = start - window
    own = sinks + chosen + last - window - loaded.num_rows
    end = gl.where(loaded.num_rows > 0, own + loaded.num_rows, 0)
    return Work(loaded.first_row, loaded.num_rows, sinks, chosen, window, hidden, own, end)
