"""vLLM's CUDA platform, which needs only the checks and the scheduler of HiP attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms.cuda import CudaPlatform

from hipserve.integrations.vllm import compat, platform

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class HiPCudaPlatform(CudaPlatform):  # type: ignore[misc]
    """The platform that vLLM uses on CUDA machines where hipserve is installed."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        super().check_and_update_config(vllm_config)
        if compat.uses_hip(vllm_config):
            platform.prepare(vllm_config)
