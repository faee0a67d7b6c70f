"""Laws that every selection keeps."""

from __future__ import annotations

from hipserve.config import HiPConfig
from hipserve.plan import pruning_rule
from hipserve.testing.cases import Case
from hipserve.types import BlockSelection


def assert_lawful(selection: BlockSelection, case: Case, config: HiPConfig) -> None:
    """Inside the middle, ascending, without duplicates, empty places at the end."""
    size = config.key_block_size
    blocks = case.layout.query_blocks(config.query_block_size).tolist()
    for i, (_, _, rows, position) in enumerate(blocks):
        start = int(selection.window_start[i])
        assert start == pruning_rule(config, "cpu").window_start(position, rows)
        assert start <= max(config.num_sink_tokens, position - config.sliding_window + 1)
        for row in selection.indices[i].tolist():
            chosen = [b for b in row if b >= 0]
            assert row == chosen + [-1] * (len(row) - len(chosen))
            assert chosen == sorted(set(chosen))
            if chosen:
                assert chosen[0] * size >= config.num_sink_tokens
                assert (chosen[-1] + 1) * size <= start
