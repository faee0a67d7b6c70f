"""One attention layer inside vLLM: translates steps and KV blocks."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl

from hipserve.attention import AttentionLayer, RequestSelections, StepSelections
from hipserve.attention.meter import Meter, MeteredRows
from hipserve.cache.tiles import TiledPages
from hipserve.capacity.scratch import scratch_bytes
from hipserve.config import NO_INDEX, HiPConfig, IndexForm
from hipserve.errors import ArgumentError, BackendError
from hipserve.integrations.factors import with_own_factors
from hipserve.integrations.rope import read_rope
from hipserve.integrations.vllm import compat, graphs, runners, settings
from hipserve.integrations.vllm.kv_block import (
    PAGE_DTYPES,
    BlockPages,
    Fp8,
    pages_of,
    rebuild_index,
)
from hipserve.integrations.vllm.metrics import Tally, tally
from hipserve.integrations.vllm.offload import HostedLayer, LoadCounter
from hipserve.integrations.vllm.step import HiPStep
from hipserve.ops import write_kv
from hipserve.plan import BatchLayout, PruningRule, RefreshSchedule
from hipserve.platform import (
    head_dim_refusal,
    key_refusal,
    triton_library,
    triton_refusal,
)
from hipserve.types import BlockSelection, KeyIndex, KeyPool

layer_index = functools.cache(extract_layer_index)


class HiPImpl(AttentionImpl[HiPStep]):
    """One layer."""

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
        compat.check_version()
        runners.join_runners()
        vllm_config = get_current_vllm_config()
        settings.check(vllm_config)  # on GPUs, where the platform is vLLM's own, for the first time
        if settings.offload_of(vllm_config) is not None:
            graphs.limit_graphs()
        self.device = torch.device(current_platform.device_type)
        refuse_without_kernels(self.device, vllm_config.model_config.dtype, head_size)
        refuse_without_fp8(self.device, kv_cache_dtype)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window or 0
        self.softcap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        model = vllm_config.model_config.hf_text_config
        self.config = with_own_factors(settings.hip_config(vllm_config), model)
        self.heads = heads_here(vllm_config, self.num_kv_heads)
        self.longest: int = vllm_config.model_config.max_model_len  # vLLM may lower it later
        slots = vllm_config.scheduler_config.max_num_seqs
        self.schedule = RefreshSchedule(slots, self.config.refresh_interval)
        self.selections = RequestSelections(slots)
        if self.config.refresh_interval > 1 and not self.sliding_window:
            heads = self.num_kv_heads if self.config.share_group else num_heads
            self.selections.allocate(self.device, heads, self.config.max_selected)
        self.tally = tally(vllm_config.instance_id)
        self.meter: TallyMeter | None = None  # of a layer that knows its number
        self.hosted: HostedLayer | None = None
        self.loads: LoadCounter | None = None
        self.compiled = False  # its kernels, before the first request
        self.rope: Tensor | None = None
        if self.config.streams and not self.sliding_window:
            self.rope = read_rope(model, head_size).to(self.device)

    def is_local(self, layer: Any) -> bool:
        """The model itself lets the layer read a window or a chunk only."""
        return self.sliding_window > 0 or bool(getattr(layer, "attention_chunk_size", None))

    def is_dense(self, layer: Any) -> bool:
        """The layer reads every key, or those that the model lets it."""
        return self.is_local(layer) or layer_index(layer.layer_name) in self.config.dense_layers

    def kind(self, layer: Any) -> Hashable:
        """What differs between layers that take other kernels."""
        own = self.config.of_layer(layer_index(layer.layer_name), self.heads)
        return own, self.is_dense(layer), self.sliding_window, self.writes

    @property
    def writes(self) -> bool:
        """The layer writes its pages; else it reads those of another one."""
        return self.kv_sharing_target_layer_name is None

    def index_form(self, layer: Any) -> IndexForm:
        """What is read of the keys in the layer's pages."""
        return NO_INDEX if self.is_local(layer) else self.config.index_form

    def pages_of(self, layer: Any, kv_cache: Tensor) -> BlockPages:
        """The layer's KV blocks `[num_blocks, num_kv_heads, block_size, 2 * head_dim]`, and where
        keys and values are, if not there."""
        if self.hosted is not None:
            return self.hosted.blocks(kv_cache)
        form, dtype = self.index_form(layer), PAGE_DTYPES.get(self.kv_cache_dtype)
        # vLLM sets the scales when it has loaded the model; a graph holds them.
        fp8 = dtype and Fp8(dtype, layer._k_scale_float, layer._v_scale_float)
        return pages_of(kv_cache, form, self.longest, fp8)

    def keeps_index(self, layer: Any) -> bool:
        """The layer writes pages whose index is read."""
        return self.writes and self.index_form(layer) != NO_INDEX

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
        step, hosted = attn_metadata, self.hosted
        pages = self.pages_of(layer, kv_cache)
        new = (key, value) if self.writes and key is not None and value is not None else None
        keys = BlockKeys(pages, step, new, self.keeps_index(layer), hosted)
        if step.parts:
            keys.append()
        for part in reversed(step.parts):
            self._attend(layer, query, BlockKeys(pages, part, None, False, hosted), output)
        if not step.parts:
            self._attend(layer, query, keys, output)
        return output

    def _attend(self, layer: Any, query: Tensor, keys: BlockKeys, output: Tensor) -> None:
        """The rows of a step: `query` and `output` `[num_tokens, num_q_heads, head_dim]`."""
        step = keys.step
        room = step.rows_of(output)
        out, _ = self._layer_of(layer, step).forward(step.rows_of(query), keys, room)
        if self.hosted is not None:
            self.tally.add("hipserve_pool_read_bytes", self.hosted.last_read_bytes)
        if out is not room:
            room.copy_(out)

    def _layer_of(self, layer: Any, step: HiPStep) -> AttentionLayer:
        """How this layer attends in this step."""
        prunes = step.selects and not self.is_dense(layer)
        counted = layer.layer_name == step.counted_layer
        return AttentionLayer(
            self.config.of_layer(layer_index(layer.layer_name), self.heads),
            step.plan.rule if prunes else None,
            sliding_window=self.sliding_window,
            sm_scale=self.scale,
            softcap=self.softcap,
            rope=self.rope,
            sink_logits=self.sinks,
            selections=StepSelections(self.selections, step.plan),
            account=TallyAccount(self.tally, counted) if self.device.type == "cpu" else None,
            meter=self._meter_of(layer) if self.config.meter == "sampled" else None,
        )

    def _meter_of(self, layer: Any) -> TallyMeter:
        if self.meter is None:
            self.meter = TallyMeter(layer_index(layer.layer_name), self.tally)
        return self.meter


@dataclass(slots=True)
class BlockKeys:
    """A layer's KV blocks in one step: `LayerKeys`.

    Attributes:
        pages: the blocks.
        step: the batch, and where its keys go.
        new: keys and values of the step, `[num_tokens, num_kv_heads, head_dim]` each, padding
            behind them; None where another layer writes them.
        keeps_index: what the step finds or completes changes the index of these blocks.
        hosted: where keys and values are, if not in the blocks.
    """

    pages: BlockPages
    step: HiPStep
    new: tuple[Tensor, Tensor] | None
    keeps_index: bool
    hosted: HostedLayer | None = None
    fresh: None = None

    @property
    def index(self) -> KeyIndex:
        return self.pages.index

    @property
    def layout(self) -> BatchLayout:
        return self.step.plan.layout

    @property
    def _tiled(self) -> TiledPages | None:
        """The pages of a step in which layers only launch."""
        return self.hosted.tiled if self.hosted and self.step.row_tiles else None

    def append(self) -> None:
        step = self.step
        if self.keeps_index and step.found_pages is not None:
            rebuild_index(self.pages, step.found_pages)
        if self.new is not None and (tiled := self._tiled) is not None:
            k, v = (step.rows_of(x) for x in self.new)
            tiled.write_few(k, v, step.slot_mapping)
        elif self.new is not None and self.hosted is not None:
            for part in step.parts or (step,):
                k, v = (part.rows_of(x) for x in self.new)
                self.hosted.pages.write(k, v, part.slot_mapping, part.writes)
        elif self.new is not None:
            k, v = (step.rows_of(x) for x in self.new)
            write_kv(
                k,
                v,
                self.pages.pool,
                self.index,
                step.slot_mapping,
                whole_runs=True,
                apart=step.single_rows,
                check=False,
            )
        if self.keeps_index and step.due_runs is not None:
            step.due_runs.join(self.index)

    def fetch(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,
        config: HiPConfig,
        rule: PruningRule | None,
    ) -> KeyPool:
        if self.hosted is None:
            return self.pages.pool
        if (tiled := self._tiled) is not None:
            return tiled.load(selection, layout, config, self.step.row_tiles)
        self.hosted.pages.sequences = self.step.writes
        return self.hosted.pages.fetch(selection, layout, config, rule)


@dataclass(frozen=True, slots=True)
class TallyAccount:
    """Counts into the metrics of a worker: `KeyCounter`. Reading numbers back would stall a GPU, so
    only CPUs have one.
    """

    tally: Tally
    counts_keys: bool

    def add(self, selection: BlockSelection | None, layout: BatchLayout, config: HiPConfig) -> None:
        """As `KeyCounter.add`, of one layer, which represents all pruned ones."""
        if self.counts_keys and selection is not None:
            read, visible = selection.keys_read(layout, config)
            self.tally.add("hipserve_keys_read", float(read))
            self.tally.add("hipserve_keys_visible", float(visible))

    def add_dense(self, batch: int, rows: int) -> None:
        """Not called: rows of a step are packed."""

    def add_seconds(self, search: float, attention: float) -> None:
        """As `KeyCounter.add_seconds`."""
        self.tally.add("hipserve_selection_seconds", search)
        self.tally.add("hipserve_attention_seconds", attention)


class TallyMeter(Meter):
    """Adds what it meters to the metrics of a worker."""

    def __init__(self, layer: int, tally: Tally) -> None:
        super().__init__(layer)
        self.tally = tally

    def add(self, share: Tensor, rows: MeteredRows) -> None:
        """As `Meter.add`: share `[n, num_q_heads]`."""
        super().add(share, rows)
        self.tally.add_unread(self.layer, float(share.sum()), share.numel())


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
            f"HiP attention cannot serve on {device}: {refusal}",
            f"{install}leave out --attention-backend CUSTOM",
        )


def refuse_without_fp8(device: torch.device, kv_cache_dtype: str) -> None:
    """Raises BackendError where a GPU cannot read keys in the dtype that vLLM calls so."""
    refusal = key_refusal("triton", device, PAGE_DTYPES.get(kv_cache_dtype))
    if refusal:
        raise BackendError(
            f"HiP attention cannot serve --kv-cache-dtype {kv_cache_dtype}: {refusal}",
            "use --kv-cache-dtype fp8_e5m2, or leave it out",
        )


def heads_here(vllm_config: VllmConfig, num_kv_heads: int) -> slice:
    """Which of a layer's KV heads this worker has: all, or its share under tensor parallelism."""
    total = vllm_config.model_config.get_total_num_kv_heads()
    if total == num_kv_heads:
        return slice(0, total)
    rank = get_tensor_model_parallel_rank()
    begin = rank * total // vllm_config.parallel_config.tensor_parallel_size
    return slice(begin, begin + num_kv_heads)


def touch_scratch(query: Tensor, config: HiPConfig) -> None:
    """Allocates and frees what kernels need besides their inputs, while vLLM measures memory.

    vLLM profiles steps without attention: what they would allocate later must not be given to the
    KV cache.

    query: `[num_tokens, num_q_heads, head_dim]`.
    """
    if query.device.type == "cuda":
        num_tokens, num_heads, head_dim = query.shape
        size = scratch_bytes(num_tokens, num_heads, head_dim, query.element_size(), config)
        torch.empty(size, dtype=torch.uint8, device=query.device)
