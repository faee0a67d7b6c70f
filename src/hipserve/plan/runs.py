"""Runs of keys that carry summaries: lengths, places in a page, how many are kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

COARSE_RATIO = 8
"""A coarse run, the second level, holds this many fine ones: 128 keys with the default
`bound_block_size`. They are shorter in smaller pages, but no less than half of it."""

LONG_RATIO = 16
"""A run of the levels beyond holds this many of the level below, the first one this many times this
many fine ones: 4,096, 65,536 ... keys."""

BOX_RADIUS = 0.5
"""The radius of a run longer than fine ones, as a share of half the width of its box. The whole box
says little of most of its keys: ranked by it, runs that matter lose against those with a wide one.
A single key that stands out still moves center and radius
(docs/log/2026-11-30-shorter-coarse-runs.md)."""

COARSE_KEEP = 6
"""A search scores this many times as many fine runs as it keeps."""

LONG_KEEP = 128
"""A search reads at least so many runs of every level beyond the coarse one. Sequences of no more
than so many, 524,288 keys, have none."""

WRITTEN_LEVELS = 2
"""Fine and coarse runs lie in one page and are summarised with its keys. Longer ones are joined
from the coarse ones once they are complete (`hipserve.ops.join_runs`), and lie in the page of
their last key."""

MOST_KEYS = 2**31
"""Positions have 32 bits."""


def bound_levels(
    page_size: int, bound_block_size: int, num_runs: int | None = None
) -> tuple[int, ...]:
    """Run lengths, in keys, of the levels of runs that a page of `page_size` keys carries.

    `num_runs` is the run axis of its summaries, which shows how many levels there are; None means
    that the page is a whole sequence, whose last runs may be partial.
    """
    lengths = _every_length(page_size, bound_block_size)
    if num_runs is None:
        return _levels_for(lengths, page_size)
    levels, offset = list[int](), 0
    for length in lengths:
        if offset >= num_runs:
            break
        levels.append(length)
        offset += -(-page_size // length)
    return tuple(levels)


def runs_of_pages(page_size: int, bound_block_size: int, keys: int = 0) -> int:
    """Runs that a page carries of sequences with up to `keys` keys.

    Coarse runs do not straddle pages: they divide the page, or there are none.
    """
    levels = _levels_for(_every_length(page_size, bound_block_size), keys)
    if page_size % levels[:WRITTEN_LEVELS][-1]:
        levels = levels[:1]
    return sum(-(-page_size // length) for length in levels)


def _every_length(page_size: int, bound_block_size: int) -> Iterator[int]:
    """Run lengths of all levels that any sequence in such pages has, ascending."""
    yield bound_block_size
    ratio = COARSE_RATIO
    while ratio > 1 and ratio * bound_block_size > page_size:
        ratio //= 2
    if ratio * 2 < COARSE_RATIO:
        return
    yield ratio * bound_block_size
    length = LONG_RATIO**2 * bound_block_size
    while length < MOST_KEYS:
        yield length
        length *= LONG_RATIO


def _levels_for(lengths: Iterator[int], keys: int) -> tuple[int, ...]:
    """Those of these levels that sequences of up to `keys` keys need."""
    written = itertools.islice(lengths, WRITTEN_LEVELS)
    return (*written, *itertools.takewhile(lambda length: LONG_KEEP * length < keys, lengths))


def kept_runs(keys: int, levels: Sequence[int]) -> tuple[int, ...]:
    """How many runs of each level a search keeps that is to keep `keys` by their fine runs.

    At both ends of what is searched lie runs that no longer one covers, less than one's worth each;
    they are scored as well, hence two longer runs less.
    """
    fine, *longer = levels
    counts = [-(-COARSE_KEEP * keys // length) for length in longer]
    counts[1:] = (max(count, LONG_KEEP) for count in counts[1:])
    return (-(-keys // fine), *(max(count - 2, 1) for count in counts))


def levels_within(levels: Sequence[int], segment: int) -> tuple[int, ...]:
    """Fine and coarse runs, and the longer ones of at most `segment` keys, which move together."""
    long = itertools.takewhile(lambda length: length <= segment, levels[WRITTEN_LEVELS:])
    return (*levels[:WRITTEN_LEVELS], *long)


def pruning_levels(levels: Sequence[int], kept: Sequence[int], keys: int) -> tuple[int, ...]:
    """These levels without the long ones of which a search in `keys` keys keeps every run.

    kept: as from `kept_runs`.
    """
    count = len(levels)
    while count > WRITTEN_LEVELS and keys // levels[count - 1] <= kept[count - 1]:
        count -= 1
    return tuple(levels[:count])


def bound_offsets(
    page_size: int, bound_block_size: int, num_runs: int | None = None
) -> tuple[int, ...]:
    """Where each level starts in the run axis of the summaries; the last entry is the axis length.

    A run lies in the page of its last key. Arguments as in `bound_levels`.
    """
    levels = bound_levels(page_size, bound_block_size, num_runs)
    return (0, *itertools.accumulate(-(-page_size // length) for length in levels))
