"""One attention layer inside vLLM: writes its keys, selects, attends."""

from __future__ import annotations

import functools
import time
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl

from hipserve.attention import RefreshSchedule, RequestSelections, StepPlan, absorb_sinks
from hipserve.attention.dense import attend_chosen
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, BackendError
from hipserve.integrations.vllm import settings
from hipserve.integrations.vllm.kv_block import COPY_BYTES, pages_of, remake_bounds
from hipserve.integrations.vllm.metrics import tally
from hipserve.integrations.vllm.step import HiPStep, first_rows
from hipserve.ops import write_kv
from hipserve.platform import head_dim_refusal, triton_library, triton_refusal
from hipserve.types import BlockSelection, PagedKV

SEARCH_BYTES = 256 << 20
"""Scratch of a search on a GPU, as `SCRATCH_BYTES` of its kernels, which only GPUs import."""

layer_index = functools.cache(extract_layer_index)


class HiPImpl(AttentionImpl[HiPStep]):
    """One layer."""

    # vLLM asks the backend's class for block sizes right after it made the layers, and shows it no
    # configuration.
    latest_config: ClassVar[HiPConfig] = HiPConfig()

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",  # noqa: ARG002
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            hint = "leave out --attention-backend CUSTOM"
            raise ArgumentError("alibi_slopes", "none", "some", hint)
        vllm_config = get_current_vllm_config()
        settings.check(vllm_config)  # on GPUs, where the platform is vLLM's own, for the first time
        device = torch.device(current_platform.device_type)
        refuse_without_kernels(device, vllm_config.model_config.dtype, head_size)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window or 0
        self.softcap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.config = HiPImpl.latest_config = settings.hip_config(vllm_config)
        slots = vllm_config.scheduler_config.max_num_seqs
        self.schedule = RefreshSchedule(slots, self.config.refresh_interval)
        self.selections = RequestSelections(slots)
        if self.config.refresh_interval > 1 and not self.sliding_window:
            heads = self.num_kv_heads if self.config.share_group else num_heads
            self.selections.allocate(device, heads, self.config.max_selected)
        self.tally = tally(vllm_config.instance_id)

    def is_local(self, layer: Any) -> bool:
        """The model itself lets the layer read a window or a chunk only."""
        return self.sliding_window > 0 or bool(getattr(layer, "attention_chunk_size", None))

    def is_dense(self, layer: Any) -> bool:
        """The layer reads every key, or those that the model lets it."""
        return self.is_local(layer) or layer_index(layer.layer_name) in self.config.dense_layers

    def keeps_bounds(self, layer: Any) -> bool:
        """The layer writes pages whose bounds somebody reads."""
        writes = self.kv_sharing_target_layer_name is None
        return self.config.uses_bounds and writes and not self.is_local(layer)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: HiPStep | None,
        output: Tensor,
        output_scale: Tensor | None = None,  # noqa: ARG002
        output_block_scale: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Attention of `query` `[num_tokens, num_q_heads, head_dim]`, written into `output`.

        Keys and values of the step come first, unless another layer writes the pages.
        """
        if attn_metadata is None:
            touch_scratch(query, self.config)
            return output.fill_(0)
        step, bound = attn_metadata, self.config.bound_block_size
        bounded = self.config.uses_bounds and not self.is_local(layer)
        kv = pages_of(kv_cache, bound if bounded else None)
        if step.found_pages is not None and self.keeps_bounds(layer):
            remake_bounds(kv, step.found_pages, bound)
        if key is not None and value is not None and self.kv_sharing_target_layer_name is None:
            self._write(key, value, kv, step)
        began = time.perf_counter()
        q, selection = first_rows(query, step.num_tokens), None
        if step.selects and not self.is_dense(layer):
            selection = self.selections.select(q, kv, step.plan, self.config)
        selected = time.perf_counter()
        out, lse = attend_chosen(
            q,
            kv,
            step.plan.layout,
            selection,
            config=self.config,
            sliding_window=self.sliding_window,
            sm_scale=self.scale,
            softcap=self.softcap,
        )
        if self.sinks is not None:
            out, _ = absorb_sinks(out, lse, self.sinks, check=False)
        first_rows(output, step.num_tokens).copy_(out)
        if isinstance(step.plan, StepPlan) and output.device.type == "cpu":
            self.tally.add("hipserve_selection_seconds", selected - began)
            self.tally.add("hipserve_attention_seconds", time.perf_counter() - selected)
            if selection is not None and layer.layer_name == step.counted_layer:
                self._count(selection, step.plan)
        return output

    def _write(self, key: Tensor, value: Tensor, kv: PagedKV, step: HiPStep) -> None:
        """Writes the step's keys and values and brings the bounds of their runs up to date."""
        write_kv(
            first_rows(key, step.num_tokens),
            first_rows(value, step.num_tokens),
            kv,
            step.slot_mapping,
            bound_block_size=self.config.bound_block_size,
            check=False,
        )

    def _count(self, selection: BlockSelection, plan: StepPlan) -> None:
        """Reading numbers back would stall a GPU, so that only CPUs count."""
        read, visible = selection.keys_read(plan.layout, self.config)
        self.tally.add("hipserve_keys_read", float(read))
        self.tally.add("hipserve_keys_visible", float(visible))


def refuse_without_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raises BackendError where eager torch would be slower than dense attention: on a GPU without
    kernels, and with a head_dim that the kernels do not take."""
    on_gpu = device.type == "cuda"
    refusal = (
        triton_refusal(device, dtype, head_dim) if on_gpu else head_dim_refusal("cpu", head_dim)
    )
    if refusal:
        install = "install triton, or " if refusal == triton_library() else ""
        raise BackendError(
            f"HiP attention cannot serve on {device}: {refusal}; {install}leave out "
            "--attention-backend CUSTOM"
        )


def touch_scratch(query: Tensor, config: HiPConfig) -> None:
    """Allocates and frees what kernels need besides their inputs, while vLLM measures memory.

    vLLM profiles steps without attention: what they would allocate later must not be given to the
    KV cache.
    """
    if query.device.type == "cuda":
        num_tokens, num_heads, head_dim = query.shape
        size = scratch_bytes(num_tokens, num_heads, head_dim, query.element_size(), config)
        torch.empty(size, dtype=torch.uint8, device=query.device)


def scratch_bytes(
    num_tokens: int, num_q_heads: int, head_dim: int, element_size: int, config: HiPConfig
) -> int:
    """What one layer of a step allocates at most: the search's scratch, a selection, output, lse,
    and keys of blocks whose bounds are made."""
    blocks = num_tokens // config.query_block_size + 1
    selection = blocks * num_q_heads * config.max_selected * 4
    output = num_tokens * num_q_heads * (head_dim * element_size + 4)
    return SEARCH_BYTES + selection + output + 2 * COPY_BYTES
