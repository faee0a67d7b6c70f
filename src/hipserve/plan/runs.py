"""Runs of keys that carry summaries: lengths, places in a page, how many are kept."""

from __future__ import annotations

from collections.abc import Sequence

COARSE_RATIO = 16
"""A coarse run holds this many fine ones: 256 keys with the default `bound_block_size`; fewer in
smaller pages, but no less than a quarter of it."""

COARSE_KEEP = 6
"""Of the fine level a search scores this many times what it keeps."""


def bound_levels(
    page_size: int, bound_block_size: int, num_runs: int | None = None
) -> tuple[int, ...]:
    """Run lengths, in keys, of the levels of runs that a page of `page_size` keys carries.

    `num_runs` is the run axis of its summaries, which shows whether there is a coarse level; None
    means that the page is a whole sequence, whose last runs may be partial.
    """
    ratio = COARSE_RATIO
    while ratio > 1 and ratio * bound_block_size > page_size:
        ratio //= 2
    fine_only = num_runs == -(-page_size // bound_block_size)
    coarse = (ratio * bound_block_size,) if ratio * 4 >= COARSE_RATIO and not fine_only else ()
    return (bound_block_size, *coarse)


def runs_of_pages(page_size: int, bound_block_size: int) -> int:
    """Runs that a page of a longer sequence carries.

    Coarse runs do not straddle pages: they divide the page, or there are none.
    """
    if page_size % bound_levels(page_size, bound_block_size)[-1]:
        return -(-page_size // bound_block_size)
    return bound_offsets(page_size, bound_block_size)[-1]


def kept_runs(keys: int, levels: Sequence[int]) -> tuple[int, ...]:
    """How many runs of each level a search keeps that is to keep `keys` by their fine runs.

    At both ends of what is searched lie fine runs that no coarse run covers, less than one's worth
    each; they are scored as well, hence the two coarse runs less.
    """
    fine, *coarse = levels
    return (-(-keys // fine), *(max(-(-COARSE_KEEP * keys // run) - 2, 1) for run in coarse))


def bound_offsets(
    page_size: int, bound_block_size: int, num_runs: int | None = None
) -> tuple[int, ...]:
    """Where each level starts in the run axis of the summaries; the last entry is the axis length.

    Arguments as in `bound_levels`.
    """
    offsets = [0]
    for length in bound_levels(page_size, bound_block_size, num_runs):
        offsets.append(offsets[-1] + -(-page_size // length))
    return tuple(offsets)
