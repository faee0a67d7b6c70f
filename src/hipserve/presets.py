"""Sets of values that a configuration may start from, by name."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"rerank": 2},
    "accurate": {"rerank": 8},
    "paper": {
        "budget": 512,
        "selector": "tree",
        "key_block_size": 2,
        "query_block_size": 64,
        "query_stride": 2,
        "relative_scores": False,
        "share_group": False,
        "num_sink_tokens": 16,
        "sliding_window": 256,
        "dense_layers": 3,
        "dense_below": 0,
        "refresh_interval": 8,
    },
}
