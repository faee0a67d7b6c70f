"""Numbers out of what vLLM shows on `/metrics`, in Prometheus' text form."""

from __future__ import annotations

import re
from collections.abc import Iterator


def kv_tokens(metrics: str) -> int:
    """Tokens that the KV caches of all engines hold."""
    return sum(
        int(_label(line, "num_gpu_blocks")) * int(_label(line, "block_size"))
        for line in metrics.splitlines()
        if line.startswith("vllm:cache_config_info{")
    )


def _label(line: str, name: str) -> str:
    found = re.search(rf'\b{name}="(\d+)"', line)
    return found[1] if found else "0"


def samples(metrics: str, name: str) -> Iterator[float]:
    """The values of a metric, one for each set of labels."""
    for line in metrics.splitlines():
        if line.startswith((name + " ", name + "{")):
            yield float(line.rsplit(" ", 1)[1])
