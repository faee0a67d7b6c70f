"""vLLM's CPU platform, except that it heeds `--attention-backend CUSTOM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from hipserve.integrations.vllm import compat, settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

SCHEDULER = "hipserve.integrations.vllm.scheduler.QueryBlockScheduler"


class HiPCpuPlatform(CpuPlatform):
    """The platform that vLLM uses on CPU machines where hipserve is installed."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        cache = vllm_config.cache_config
        custom = vllm_config.attention_config.backend == AttentionBackendEnum.CUSTOM
        chosen = cache.user_specified_block_size
        super().check_and_update_config(vllm_config)
        if not custom:
            return
        compat.check_version()
        if not chosen:
            cache.block_size = settings.BLOCK_SIZE
        settings.check(vllm_config)
        if vllm_config.scheduler_config.scheduler_cls is None:
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER

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
