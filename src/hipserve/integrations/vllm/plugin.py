"""The entry points through which vLLM finds hipserve, in every process that it starts."""

from __future__ import annotations

BACKEND = "hipserve.integrations.vllm.backend.HiPBackend"
CPU_PLATFORM = "hipserve.integrations.vllm.platform.HiPCpuPlatform"


def register() -> None:
    """`vllm.general_plugins`: makes `--attention-backend CUSTOM` mean HiP attention."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


def cpu_platform() -> str | None:
    """`vllm.platform_plugins`: the CPU platform that heeds the flag; None on other machines."""
    from vllm.platforms import cpu_platform_plugin

    found = cpu_platform_plugin()
    return CPU_PLATFORM if found == "vllm.platforms.cpu.CpuPlatform" else None
