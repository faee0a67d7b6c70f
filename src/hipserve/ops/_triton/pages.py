"""Rows in pages: keys, values or summaries of runs, found through the page table of a sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class CacheStrides(NamedTuple):
    """Strides of `k_cache` or `v_cache`, in elements."""

    page: Any
    slot: Any
    head: Any


class SummaryStrides(NamedTuple):
    """Strides of `summaries`, in elements; a side is the center or the radius."""

    page: Any
    run: Any
    head: Any
    side: Any


class PagedRows(NamedTuple):
    """Keys, values or summaries of one KV head, as a sequence finds them."""

    start: Any
    """Pointer to what the head has in page 0."""
    strides: Any
    """`CacheStrides` or `SummaryStrides`."""
    table: Any
    """Pointer to the page ids of the sequence."""
    page_size: Any


@triton.jit
def key_offsets(rows, positions, there, MASKED: tl.constexpr = True):
    """Offsets `[n]` int64 from `rows.start` of the keys at `positions` `[n]`.

    `table[position // page_size] * strides.page + position % page_size * strides.slot`
    """
    if MASKED:
        page = tl.load(rows.table + positions // rows.page_size, mask=there, other=0)  # [n]
    else:
        page = tl.load(rows.table + positions // rows.page_size)  # [n]
    in_pages = page.to(tl.int64) * rows.strides.page
    return in_pages + (positions % rows.page_size).to(tl.int64) * rows.strides.slot


@triton.jit
def place_of(page, places):
    """The page, int64, that holds page `page` of the layout: itself without `places`."""
    if places is None:  # noqa: SIM108 - known when it is compiled
        place = page
    else:
        place = tl.load(places + page).to(tl.int64)
    return place
