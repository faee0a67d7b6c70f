"""The attention backend: vLLM's calls in hipserve's words."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from hipserve.attention import (
    CapturedPlan,
    DecodeBuffers,
    RefreshSchedule,
    RequestSelections,
    SequenceStep,
    StepPlan,
)
from hipserve.attention.crossover import settled_for
from hipserve.attention.dense import attend_chosen
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, BackendError
from hipserve.integrations.vllm import compat, settings
from hipserve.integrations.vllm.metrics import tally
from hipserve.ops import write_kv
from hipserve.platform import head_dim_refusal, triton_library, triton_refusal
from hipserve.types import BatchLayout, BlockSelection, PagedKV

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

compat.check_version()


class HiPBackend(AttentionBackend):
    """HiP attention as vLLM's `CUSTOM` backend."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "float32"]
    # vLLM asks the class for block sizes right after it made the layers, and shows it no config.
    config: ClassVar[HiPConfig] = HiPConfig()

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
        return max(default_block_size, settings.BLOCK_SIZE)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pads the blocks of layers that may be pruned with room for the bounds of their keys."""
        if not isinstance(spec, FullAttentionSpec) or spec.page_size_padded is not None:
            return spec
        layout = block_layout(spec, cls.config)
        return replace(spec, page_size_padded=layout.padded_bytes) if layout.num_runs else spec


def block_layout(spec: AttentionSpec, config: HiPConfig) -> settings.BlockLayout:
    """How a layer's part of a KV block is furnished."""
    bounds = config.bound_block_size if config.uses_bounds else None
    sizes = (spec.block_size, spec.num_kv_heads, spec.head_size)
    return settings.BlockLayout(*sizes, spec.dtype, bounds)


@dataclass(frozen=True, slots=True)
class HiPStep(AttentionMetadata):
    """What the layers of one step need, built once for all of them.

    Attributes:
        num_tokens: rows of q that count; the rest is padding.
        slot_mapping: `[num_tokens]` int64, where their keys and values go.
        plan: the batch, and which query blocks select afresh.
        selects: some query block is pruned, or its selection kept; else every layer is dense.
        counted_layer: the layer whose reads are counted for all pruned ones.
    """

    num_tokens: int
    slot_mapping: Tensor
    plan: StepPlan | CapturedPlan
    selects: bool
    counted_layer: str


class HiPBuilder(AttentionMetadataBuilder[HiPStep]):
    """Builds the step for the layers of one KV cache group."""

    # Steps of one row a request are replayed as a whole; `DecodeBuffers` keeps their addresses.
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        refuse_without_kernels(device, kv_cache_spec.dtype, kv_cache_spec.head_size)
        settings.check(vllm_config)  # on GPUs, where the platform is vLLM's own, for the first time
        compat.follow_requests()
        compat.receive_from_stages()
        self.config = self._settled(vllm_config, kv_cache_spec, device)
        slots = vllm_config.scheduler_config.max_num_seqs
        self.schedule = RefreshSchedule(slots, self.config.refresh_interval)
        # Only GPUs replay graphs; elsewhere a step selects for the rows that need it alone.
        self.buffers = DecodeBuffers(slots, device) if device.type == "cuda" else None
        self.tally = tally(vllm_config.instance_id)
        layers: Any = vllm_config.compilation_config.static_forward_context
        impls: dict[str, HiPImpl] = {name: layers[name].impl for name in layer_names}
        self.windowed = sum(impl.sliding_window > 0 for impl in impls.values())
        for impl in impls.values():
            impl.config = self.config
        pruned = [name for name, impl in impls.items() if not impl.is_dense(name)]
        self.num_pruned, self.counted_layer = len(pruned), pruned[0] if pruned else ""
        self.speculates = vllm_config.speculative_config is not None
        longest = vllm_config.model_config.max_model_len
        self.decode_prunes = bool(pruned) and self.config.may_prune(longest, 1)
        blocks = (vllm_config.cache_config.num_gpu_blocks or 0) * len(layer_names)
        bounds = block_layout(kv_cache_spec, self.config).bound_bytes * blocks
        self.tally.add("hipserve_page_bound_bytes", 0 if self.windowed else bounds)

    @staticmethod
    def _settled(vllm_config: VllmConfig, spec: AttentionSpec, device: torch.device) -> HiPConfig:
        """The configuration of all layers, with the crossovers of this machine."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        group = model.get_num_attention_heads(parallel) // spec.num_kv_heads
        kind = (device, spec.dtype, spec.head_size, max(group, 1))
        return settled_for(settings.hip_config(vllm_config), *kind)

    def build(
        self,
        common_prefix_len: int,  # noqa: ARG002
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,  # noqa: ARG002
    ) -> HiPStep:
        common = common_attn_metadata
        if self.speculates:  # then the host's lengths may be too long
            common = replace(common, seq_lens_cpu_upper_bound=None)
        requests = compat.step_requests(common)
        self.schedule.forget(requests.ended)
        rows = sequences(common, requests.rows, self.config)
        plan, selects = self._plan(common, rows)
        count = int(common.query_start_loc_cpu[-1])
        slots = common.slot_mapping[:count]
        return HiPStep(count, slots, plan, selects, self.counted_layer)

    def _plan(
        self, common: CommonAttentionMetadata, rows: list[SequenceStep]
    ) -> tuple[StepPlan | CapturedPlan, bool]:
        decisions = self.schedule.step(rows)
        layout = BatchLayout(common.block_table_tensor, common.seq_lens, common.query_start_loc)
        size = self.config.query_block_size
        if self.buffers is not None and common.max_query_len == 1:
            return self.buffers.plan(layout, size, decisions), self.decode_prunes
        lengths = (host_seq_lens(common).tolist(), common.query_start_loc_cpu.tolist())
        layout = replace(layout, lengths=lengths)
        plan = StepPlan.make(layout, size, decisions)
        return plan, self._selects(plan, sum(row.decoding for row in rows))

    def _selects(self, plan: StepPlan, num_decoding: int) -> bool:
        """Counts a step's query blocks; whether its layers have anything to select."""
        blocks = plan.layout.query_blocks(self.config.query_block_size)[:, 2:].tolist()
        sinks, pruned = self.config.num_sink_tokens, self.num_pruned
        short = sum(self.config.window_start(first, rows) <= sinks for rows, first in blocks)
        dense = len(self.layer_names) - pruned - self.windowed
        name = "hipserve_dense_query_blocks"
        self.tally.add("hipserve_query_blocks", len(blocks) * len(self.layer_names))
        self.tally.add(name, short * pruned, "short")
        self.tally.add(name, len(blocks) * dense, "dense_layer")
        self.tally.add(name, len(blocks) * self.windowed, "model_window")
        if short == len(blocks):
            visible = plan.layout.keys_visible or 0
            for keys in ("hipserve_keys_read", "hipserve_keys_visible"):
                self.tally.add(keys, visible if pruned else 0)
            return False
        self.tally.add("hipserve_refreshes", (num_decoding - len(plan.kept)) * pruned)
        self.tally.add("hipserve_reuses", len(plan.kept) * pruned)
        return pruned > 0


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


def host_seq_lens(common: CommonAttentionMetadata) -> Tensor:
    """`[num_reqs]` int32 on the host, without waiting for a device."""
    bound = common.seq_lens_cpu_upper_bound
    return common.seq_lens.cpu() if bound is None else bound[: common.num_reqs]


def sequences(
    common: CommonAttentionMetadata, requests: tuple[Any, ...] | None, config: HiPConfig
) -> list[SequenceStep]:
    """What every row does; one that reads every key keeps nothing and counts as no decode row.

    Where requests are known, rows beyond them pad a graph's batch and are left out.
    """
    lens = common.query_start_loc_cpu.diff().tolist()
    prefilling = common.is_prefilling.tolist() if common.is_prefilling is not None else []
    seq_lens = host_seq_lens(common).tolist()
    pruned = [config.window_start(n - 1, 1) > config.num_sink_tokens for n in seq_lens]
    return [
        SequenceStep(
            request,
            seq_lens[i],
            lens[i] == 1 and pruned[i] and not (i < len(prefilling) and prefilling[i]),
        )
        for i, request in enumerate(requests or (None,) * common.num_reqs)
    ]


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
    ) -> None:
        if alibi_slopes is not None:
            hint = "leave out --attention-backend CUSTOM"
            raise ArgumentError("alibi_slopes", "none", "some", hint)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window or 0
        self.softcap = logits_soft_cap or 0.0
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        vllm_config = get_current_vllm_config()
        self.config = HiPBackend.config = settings.hip_config(vllm_config)
        self.selections = RequestSelections(vllm_config.scheduler_config.max_num_seqs)
        self.tally = tally(vllm_config.instance_id)
        self._pages: tuple[int, PagedKV] | None = None

    def is_dense(self, layer_name: str) -> bool:
        """The layer reads every key, or those of the model's own window."""
        dense = layer_index(layer_name) in self.config.dense_layers
        return dense or self.sliding_window > 0

    def pages(self, kv_cache: Tensor) -> PagedKV:
        """This layer's views of vLLM's `[num_blocks, num_kv_heads, block_size, 2 * head_dim]`."""
        address = kv_cache.data_ptr()
        if self._pages is None or self._pages[0] != address:
            self._pages = (address, page_views(kv_cache, self.config, not self.sliding_window))
        return self._pages[1]

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
            return output.fill_(0)
        step, kv = attn_metadata, self.pages(kv_cache)
        if key is not None and value is not None and self.kv_sharing_target_layer_name is None:
            self._write(key, value, kv, step)
        began = time.perf_counter()
        q, selection = first_rows(query, step.num_tokens), None
        if step.selects and not self.is_dense(layer.layer_name):
            selection = self.selections.select(q, kv, step.plan, self.config)
        selected = time.perf_counter()
        out, _ = attend_chosen(
            q,
            kv,
            step.plan.layout,
            selection,
            config=self.config,
            sliding_window=self.sliding_window,
            sm_scale=self.scale,
            softcap=self.softcap,
        )
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


def first_rows(x: Tensor, count: int) -> Tensor:
    """The rows that are no padding; most steps have none, and a slice costs more than asking."""
    return x if x.shape[0] == count else x[:count]


def page_views(kv_cache: Tensor, config: HiPConfig, prunable: bool) -> PagedKV:
    """Keys, values and bounds inside a layer's KV blocks, without copying."""
    blocks, heads, size, content = kv_cache.shape
    head_dim = content // 2
    rows = kv_cache.transpose(1, 2)
    bounds = config.bound_block_size if config.uses_bounds and prunable else None
    layout = settings.BlockLayout(size, heads, head_dim, kv_cache.dtype, bounds)
    k_bounds = None
    if layout.num_runs:
        k_bounds = kv_cache.as_strided(
            (blocks, layout.num_runs, heads, 2, head_dim),
            (kv_cache.stride(0), 2 * head_dim, layout.num_runs * 2 * head_dim, head_dim, 1),
            kv_cache.storage_offset() + size * layout.row,
        )
    return PagedKV(rows[..., :head_dim], rows[..., head_dim:], k_bounds)
