"""The entry points through which vLLM finds hipserve, in every process that it starts."""

from __future__ import annotations

from hipserve.integrations.vllm.command import name_the_wheel

BACKEND = "hipserve.integrations.vllm.backend.HiPBackend"
CPU_PLATFORM = "hipserve.integrations.vllm.platform_cpu.HiPCpuPlatform"
CUDA_PLATFORM = "hipserve.integrations.vllm.platform_cuda.HiPCudaPlatform"


def register() -> None:
    """`vllm.general_plugins`: makes `--attention-backend CUSTOM` mean HiP attention."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


def cpu_platform() -> str | None:
    """`vllm.platform_plugins`: the CPU platform that heeds the flag; None on other machines.

    vLLM asks for its platform first in every process that it starts. Here the CPU wheel therefore
    gets the name by which vLLM looks for it.
    """
    name_the_wheel()
    from vllm.platforms import cpu_platform_plugin

    found = cpu_platform_plugin()
    return CPU_PLATFORM if found == "vllm.platforms.cpu.CpuPlatform" else None


def cuda_platform() -> str | None:
    """`vllm.platform_plugins`: the CUDA platform with HiP's scheduler; None elsewhere."""
    from vllm.platforms import cuda_platform_plugin

    found = cuda_platform_plugin()
    return CUDA_PLATFORM if found == "vllm.platforms.cuda.CudaPlatform" else None
