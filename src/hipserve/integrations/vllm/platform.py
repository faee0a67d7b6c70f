"""vLLM's platforms, except that they know what HiP attention needs.

The CPU platform heeds `--attention-backend CUSTOM` and repairs vLLM's worker. Both platforms refuse
what HiP attention cannot do before a model is loaded, and set the scheduler of query blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hipserve.integrations.vllm import compat, settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULER = "hipserve.integrations.vllm.scheduler.QueryBlockScheduler"
ASYNC_SCHEDULER = "hipserve.integrations.vllm.scheduler.AsyncQueryBlockScheduler"


def prepare(vllm_config: VllmConfig) -> None:
    """Checks the configuration of an engine with HiP attention, and sets its scheduler.

    Raises:
        BackendError: this vLLM lacks what hipserve uses.
        ConfigError: an option that HiP attention cannot honour.
    """
    compat.check_version()
    settings.check(vllm_config)
    limits = vllm_config.scheduler_config
    if limits.scheduler_cls is None:
        limits.scheduler_cls = ASYNC_SCHEDULER if limits.async_scheduling else SCHEDULER
