"""Runs of keys that carry bounds: their lengths, their places in a page, and how many are kept."""

from __future__ import annotations

from collections.abc import Sequence

COARSE_RATIO = 16
"""A coarse run holds this many fine ones: 256 keys with the default `bound_block_size`; fewer in
smaller pages, but no less than a quarter of it."""

COARSE_KEEP = 6
"""Of the fine level a search scores this many times what it keeps."""


WHOLE_SEQUENCE = 8192
"""Pages from this many keys on, and those with a partial fine run, are whole sequences."""


def bound_levels(page_size: int, bound_block_size: int) -> tuple[int, ...]:
    """Run lengths, in keys, of the bound levels that a page of `page_size` keys carries.

    Coarse runs do not straddle the pages of a sequence: they divide the page, or there are none.
    Where one page is the whole sequence, the last run may be partial.
    """
    whole = page_size >= WHOLE_SEQUENCE or page_size % bound_block_size > 0
    ratio = COARSE_RATIO
    while ratio > 1 and not _holds(page_size, ratio * bound_block_size, whole):
        ratio //= 2
    coarse = (ratio * bound_block_size,) if ratio * 4 >= COARSE_RATIO else ()
    return (bound_block_size, *coarse)


def _holds(page_size: int, run: int, whole: bool) -> bool:
    return run <= page_size and (whole or page_size % run == 0)


def kept_runs(keys: int, levels: Sequence[int]) -> tuple[int, ...]:
    """How many runs of each level a search keeps that is to keep `keys` by their fine runs.

    At both ends of what is searched lie fine runs that no coarse run covers, less than one's worth
    each; they are scored as well, hence the two coarse runs less.
    """
    fine, *coarse = levels
    return (-(-keys // fine), *(max(-(-COARSE_KEEP * keys // run) - 2, 1) for run in coarse))


def bound_offsets(page_size: int, bound_block_size: int) -> tuple[int, ...]:
    """Where each level starts in the run axis of `k_bounds`; the last entry is the axis length."""
    offsets = [0]
    for length in bound_levels(page_size, bound_block_size):
        offsets.append(offsets[-1] + -(-page_size // length))
    return tuple(offsets)
