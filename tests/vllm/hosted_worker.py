"""A worker process of `hosting.py`: keys and values in host memory, without a GPU."""

from __future__ import annotations

from typing import Any

from hosting import as_on_a_gpu

from hipserve.integrations.vllm.worker import HiPCpuWorker


class HostedWorker(HiPCpuWorker):
    """Has tiles of the reference before it loads a model."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        as_on_a_gpu()
        super().__init__(*positional, **named)
