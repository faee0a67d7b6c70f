"""vLLM's CPU platform, except that it heeds `--attention-backend CUSTOM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from hipserve.integrations.vllm import compat, platform
from hipserve.integrations.vllm.limits import BLOCK_SIZE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

WORKER = "hipserve.integrations.vllm.worker.HiPCpuWorker"


class HiPCpuPlatform(CpuPlatform):
    """The platform that vLLM uses on CPU machines where hipserve is installed."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        cache, workers = vllm_config.cache_config, vllm_config.parallel_config
        chosen = cache.user_specified_block_size
        super().check_and_update_config(vllm_config)
        if workers.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker":
            workers.worker_cls = WORKER
        if compat.uses_hip(vllm_config):
            if not chosen:
                cache.block_size = BLOCK_SIZE
            platform.prepare(vllm_config)

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: AttentionBackendEnum,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        if selected_backend != AttentionBackendEnum.CUSTOM:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        backend = compat.load_backend(selected_backend)
        compat.check_layer(backend, attn_selector_config)
        return selected_backend.get_path()
