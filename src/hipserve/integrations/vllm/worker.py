"""vLLM's CPU worker, whose model runner is repaired before it is made."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from hipserve.integrations.vllm import runners


class HiPCpuWorker(CPUWorker):
    """Replaces vLLM's worker, with HiP attention or without."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        runners.keep_draws()
        super().__init__(*positional, **named)
