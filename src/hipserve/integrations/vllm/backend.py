"""The attention backend: its properties, as vLLM asks for them, and its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from hipserve.config import DEFAULT
from hipserve.integrations.vllm import block_size as block_sizes
from hipserve.integrations.vllm import settings
from hipserve.integrations.vllm.builder import HiPBuilder
from hipserve.integrations.vllm.kv_block import BlockLayout
from hipserve.integrations.vllm.layer import HiPImpl
from hipserve.integrations.vllm.limits import BLOCK_SIZE, FP8_CACHES
from hipserve.integrations.vllm.offload import index_only
from hipserve.platform import head_dim_refusal

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec


class HiPBackend(AttentionBackend):
    """HiP attention as vLLM's `CUSTOM` backend."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        *("auto", "float16", "bfloat16", "float32"),
        *FP8_CACHES,
    ]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HiPImpl]:
        return HiPImpl

    @staticmethod
    def get_builder_cls() -> type[HiPBuilder]:
        return HiPBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,  # noqa: ARG004
    ) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """vLLM asks after it has loaded the model, with its configuration in place."""
        if current_platform.is_cpu():
            return max(default_block_size, BLOCK_SIZE)
        engine = get_current_vllm_config()
        if settings.offload_of(engine) is not None:
            return BLOCK_SIZE
        return block_sizes.of_engine(engine, current_platform.get_device_total_memory())

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return not head_dim_refusal("cpu" if current_platform.is_cpu() else "triton", head_size)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """The index of keys that came another way is built when their request starts."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Query blocks are split by the host's query lengths."""
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,  # noqa: ARG003
        dtype: torch.dtype,  # noqa: ARG003
        kv_cache_dtype: Any,  # noqa: ARG003
        block_size: int | None,  # noqa: ARG003
        use_mla: bool,  # noqa: ARG003
        has_sink: bool,  # noqa: ARG003
        use_sparse: bool,  # noqa: ARG003
        use_mm_prefix: bool,
        device_capability: Any,  # noqa: ARG003
    ) -> str | None:
        """What to do instead of choosing another attention, next to vLLM's own reasons."""
        if not use_mm_prefix:  # images, which are read in both directions
            return None
        images = """--limit-mm-per-prompt '{"image":0}'"""
        return f"to serve the text model only, pass --language-model-only or {images}"

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pads the blocks of layers that may be pruned with room for the index of their keys.

        With blocks of one token vLLM asks for the bytes of a token, to make the blocks of hybrids
        as large as their recurrent states; those are padded later to blocks with an index.
        """
        if type(spec) is not FullAttentionSpec or spec.page_size_padded is not None:
            return spec
        if spec.block_size == 1:
            return spec
        engine = get_current_vllm_config_or_none()  # `runners.show_configuration`
        config = settings.hip_config(engine) if engine else DEFAULT
        layout = BlockLayout.of(spec, config, engine.model_config.max_model_len if engine else 0)
        if engine and settings.offload_of(engine) is not None:
            return index_only(spec, layout)
        return replace(spec, page_size_padded=layout.padded_bytes) if layout.index_bytes else spec
