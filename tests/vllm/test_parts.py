"""A step with keys in host memory is cut into parts that tiles or staging hold."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from hipserve import FitError, HiPConfig
from hipserve.cache.tiles import TilesRead, row_tiles
from hipserve.integrations.vllm.parts import Room, runs_that_fit
from hipserve.plan import pruning_rule


def room(slots: int, **settings: Any) -> Room:
    config = HiPConfig(code_bits=4, **settings)
    lists = 1 if config.share_group else 4
    return Room(slots, lists, config, pruning_rule(config, "cuda"), longest=131072)


ROW, PADDING = TilesRead(1, 1, 10, 10), TilesRead()


def prompt(rows: int, block: int = 64) -> TilesRead:
    blocks = -(-rows // block)
    return TilesRead(blocks, rows, 10, 10 * blocks)


def test_rows_read_tiles_together_as_many_as_fit() -> None:
    found = runs_that_fit([ROW] * 7, room(30))
    assert [*found] == [(0, 3, True), (3, 6, True), (6, 7, True)]


def test_long_prompts_are_alone_and_staged() -> None:
    found = runs_that_fit([ROW, prompt(100), prompt(40), ROW, ROW, PADDING], room(1000))
    assert [*found] == [(0, 1, True), (1, 2, False), (2, 3, False), (3, 5, True)]


def test_prompts_in_small_query_blocks_do_not_share_staging() -> None:
    """Tiles serve them, but they write staged pages, of which there are those of one sequence."""
    prompts = [prompt(600, 16), prompt(600, 16), ROW]
    found = runs_that_fit(prompts, room(10_000, query_block_size=16))
    assert [*found] == [(0, 1, True), (1, 2, True), (2, 3, True)]


def test_an_arena_below_one_row_is_refused_before_a_request_comes() -> None:
    tiles = row_tiles(HiPConfig())
    room(tiles).check()
    with pytest.raises(FitError, match=f"a row reads {4 * tiles} tiles of a KV head"):
        room(tiles, share_group=False).check()
