"""Builds the step that the layers of one KV cache group share."""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)

from hipserve.attention.crossover import rule_for
from hipserve.errors import BackendError, ConfigError
from hipserve.integrations.vllm import graphs, settings
from hipserve.integrations.vllm.kv_block import BlockLayout, DueRuns, rebuild_index
from hipserve.integrations.vllm.metrics import tally
from hipserve.integrations.vllm.offload import LoadCounter, check_blocks, host_layers
from hipserve.integrations.vllm.parts import cut, writes_of
from hipserve.integrations.vllm.runners import StepRequests, step_requests
from hipserve.integrations.vllm.step import (
    HiPStep,
    due_runs,
    found_keys,
    found_pages,
    host_seq_lens,
    sequences,
)
from hipserve.integrations.vllm.warm_up import Limits, compile_kernels
from hipserve.plan import (
    BatchLayout,
    CapturedPlan,
    DecodeBuffers,
    PruningRule,
    StepPlan,
    split_batch,
)

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

    from hipserve.cache.tiles import TiledPages
    from hipserve.offload import Offload

READ = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""KV cache specs that are read as what they are; what derives from them means something else."""

LOADS_FIRST = frozenset(
    {"OffloadingConnector", "SimpleCPUOffloadConnector", "NixlConnector", "MooncakeConnector"}
)
"""KV connectors that bring keys before their request is scheduled, not while its step runs."""


class HiPBuilder(AttentionMetadataBuilder[HiPStep]):
    """Builds the step for the layers of one KV cache group."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = settings.hip_config(vllm_config)
        self.rule = self._rule(vllm_config, kv_cache_spec, device)
        self.verified_rows = verified_rows(vllm_config)
        self.offload = settings.offload_of(vllm_config)
        self.tally = tally(vllm_config.instance_id)
        layers: Any = vllm_config.compilation_config.static_forward_context
        self.layers: dict[str, Any] = {name: layers[name] for name in layer_names}
        local = [name for name, layer in self.layers.items() if layer.impl.is_local(layer)]
        pruned = [name for name, layer in self.layers.items() if not layer.impl.is_dense(layer)]
        self.num_local, self.num_pruned = len(local), len(pruned)
        self.counted_layer = pruned[0] if pruned else ""
        # Of one layer, since all builders of a group have to share it (vLLM makes several).
        self.schedule = layers[layer_names[0]].impl.schedule
        self.longest = vllm_config.model_config.max_model_len
        self.indexed = any(layer.impl.keeps_index(layer) for layer in self.layers.values())
        self.faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        longest = max(layer.impl.longest for layer in self.layers.values())
        self.layout = BlockLayout.of(kv_cache_spec, self.config, longest)
        self._check_spec(kv_cache_spec)
        self.room = graphs.room_of(vllm_config)
        self.loads: LoadCounter | None = None
        self.tiled: list[TiledPages] = []
        if self.offload is not None:
            self._host(vllm_config, self.offload, self.layout)
        slots = vllm_config.scheduler_config.max_num_seqs
        self.replayed_requests = slots if self.room is None else min(slots, self.room.rows)
        self.row_tiles = 0 if self.room is None else self.room.row_tiles
        # Only GPUs replay graphs; elsewhere a step selects only for the rows that need it.
        replays = device.type == "cuda" and self.replayed_requests > 0
        self.buffers = DecodeBuffers(slots, device) if replays else None
        self._compile(vllm_config, kv_cache_spec)
        blocks = (vllm_config.cache_config.num_gpu_blocks or 0) * (len(layer_names) - len(local))
        self.tally.add("hipserve_page_bound_bytes", self.layout.index_bytes * blocks)

    @staticmethod
    def _rule(vllm_config: VllmConfig, spec: AttentionSpec, device: torch.device) -> PruningRule:
        """The pruning rule of all layers, with the crossovers of this machine."""
        group = heads_of(vllm_config) // spec.num_kv_heads
        kind = (device, vllm_config.model_config.dtype, spec.head_size, max(group, 1))
        return rule_for(settings.hip_config(vllm_config), *kind)

    @classmethod
    def get_cudagraph_support(
        cls,
        vllm_config: VllmConfig,
        kv_cache_spec: KVCacheSpec,  # noqa: ARG003
    ) -> AttentionCGSupport:
        """Steps of equally many rows a request are replayed whole: `DecodeBuffers` keeps addresses.

        A KV connector that loads while the step runs needs layers that are called in every step,
        and so do keys in a file, and those in host memory if the arena has no room for a row.
        """
        if settings.offload_of(vllm_config) is not None:
            room = graphs.room_of(vllm_config)
            single = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            return single if room and room.rows else AttentionCGSupport.NEVER
        transfer = vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector not in LOADS_FIRST:
            return AttentionCGSupport.NEVER
        size = settings.hip_config(vllm_config).query_block_size
        if 1 < verified_rows(vllm_config) <= size:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def _check_spec(self, spec: AttentionSpec) -> None:
        """Raises BackendError where blocks are not what this backend reads."""
        name = type(spec).__name__
        if type(spec) not in READ or spec.head_size_v != spec.head_size:
            raise BackendError(
                f"HiP attention cannot read the KV cache of {self.layer_names[0]} ({name}, heads "
                f"of {spec.head_size} and {spec.head_size_v})",
                "leave out --attention-backend CUSTOM",
            )
        layout = self.layout
        needed = layout.padded_bytes if self.offload is None else layout.index_bytes
        if self.indexed and spec.page_size_bytes < needed:
            raise BackendError(
                f"a KV block of {self.layer_names[0]} ({name}) has {spec.page_size_bytes} bytes, "
                f"but with the index of its keys it needs {needed}",
                'choose another --block-size, or set {"hip": {"selector": "tree"}}',
            )

    def _host(self, vllm_config: VllmConfig, offload: Offload, layout: BlockLayout) -> None:
        """Makes the memory for keys and values of all layers, which have to be of this group, where
        no builder did so before.

        Raises:
            ConfigError: the number of blocks is not what host memory holds, or some layers have a
                window, whose blocks vLLM makes as large as those of the others.
            FitError: there is less memory than that, or too little for what a row reads.
        """
        if self.num_local or len(self.layers) < len(graphs.attention_layers(vllm_config)):
            raise ConfigError("offload", "a model whose layers all read every key", "windows")
        blocks = check_blocks(vllm_config, offload, layout, len(self.layers))
        if self.room is not None:
            self.room.check()
        impls = [self.layers[x].impl for x in sorted(self.layers, key=extract_layer_index)]
        if impls[0].hosted is None:
            asked = (offload, layout, self.config)
            made = host_layers(*asked, device=self.device, layers=len(impls), blocks=blocks)
            for impl, hosted in zip(impls, made, strict=True):
                impl.hosted = hosted
                self.tally.add("hipserve_arena_bytes", hosted.arena.nbytes if hosted.arena else 0)
            self.tally.add("hipserve_pool_bytes", len(impls) * blocks * layout.content_bytes)
            arenas = [hosted.arena for hosted in made if hosted.arena is not None]
            impls[0].loads = LoadCounter(arenas, self.tally) if arenas else None
        self.loads = impls[0].loads  # like the schedule, of one layer
        self.tiled = [impl.hosted.tiled for impl in impls if impl.hosted.tiled is not None]

    def _compile(self, vllm_config: VllmConfig, spec: AttentionSpec) -> None:
        """Compiles what requests will launch, once for the layers of a group."""
        first = next(iter(self.layers.values())).impl
        if self.device.type != "cuda" or self.offload is not None or first.compiled:
            return
        first.compiled = True
        scheduler = vllm_config.scheduler_config
        tokens, requests = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        limits = Limits(tokens, requests, self.longest)
        dtype = vllm_config.model_config.dtype
        compile_kernels(self.layers, spec, self.rule, dtype, limits)

    def build(
        self,
        common_prefix_len: int,  # noqa: ARG002
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,  # noqa: ARG002
    ) -> HiPStep:
        common = common_attn_metadata
        if self.loads is not None:
            self.loads.step()
        elif self.offload is not None:
            self._count_stalls()
        requests = step_requests(common)
        self.schedule.forget(requests.ended)
        plan, selects, decisions = self._plan(common, requests)
        replayed = isinstance(plan, CapturedPlan)
        pages, due = self._index_due(common, requests, replayed=replayed)
        if replayed:
            self._update_indexes(pages, due)
            pages = due = None
        count = int(common.query_start_loc_cpu[-1])
        slots = common.slot_mapping[:count]
        asked = (count, slots, plan, selects, self.counted_layer, common.max_query_len == 1)
        step = HiPStep(*asked, found_pages=pages, due_runs=due)
        if self.room is None:
            return step
        if replayed:
            for tiled in self.tiled:
                tiled.settle()
            step.row_tiles = self.row_tiles
            return step
        table = common.block_table_tensor.cpu()
        step.writes = writes_of(table, plan.layout, self.layout.block_size)
        return cut(step, decisions, self.room)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> HiPStep:
        """As `build`.

        Raises:
            BackendError: of a step that may read more tiles than there are (`graphs.limit_graphs`).
        """
        most, asked = self.replayed_requests, common_attn_metadata.num_reqs
        if self.room is not None and asked > most:
            raise BackendError(
                f"vLLM captures a step of {asked} requests, and there are tiles for {most}",
                """--compilation-config '{"cudagraph_mode": "PIECEWISE"}'""",
            )
        return super().build_for_cudagraph_capture(common_attn_metadata)

    def _count_stalls(self) -> None:
        """Counts the page faults of the steps before, in this process."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        self.tally.add("hipserve_pool_stalls", faults - self.faults)
        self.faults = faults

    def _index_due(
        self, common: CommonAttentionMetadata, requests: StepRequests, replayed: bool
    ) -> tuple[Tensor | None, DueRuns | None]:
        """Pages whose index is built, and long runs that are joined, before anybody reads them."""
        kept = self.offload is not None  # an index stays in its block, as nothing moves blocks
        found = found_keys(common, requests) if self.indexed and not kept else []
        self.tally.add("hipserve_found_keys", sum(keys for _, keys in found))
        pages = found_pages(common.block_table_tensor, self.kv_cache_spec.block_size, found)
        if not self.indexed or self.layout.joined_length is None:
            return pages, None
        sizes = {"length": self.layout.joined_length, "rows": self.verified_rows}
        return pages, due_runs(common, found, **sizes, replayed=replayed)

    def _update_indexes(self, pages: Tensor | None, due: DueRuns | None) -> None:
        """What layers do before they search, for a step that graphs may replay."""
        if pages is None and due is None:
            return
        for layer in self.layers.values():
            if layer.impl.keeps_index(layer):
                held = layer.impl.pages_of(layer, layer.kv_cache)
                if pages is not None:
                    rebuild_index(held, pages)
                if due is not None:
                    due.join(held.index)

    def _plan(
        self, common: CommonAttentionMetadata, requests: StepRequests
    ) -> tuple[StepPlan | CapturedPlan, bool, list[tuple[int, bool]] | None]:
        """The plan, whether its layers select, and the decisions that it was made with."""
        layout = BatchLayout(common.block_table_tensor, common.seq_lens, common.query_start_loc)
        size, keeps = self.config.query_block_size, self.config.refresh_interval > 1
        if self.buffers is not None and (rows := self._replayed_rows(common)):
            decisions = self._decide(common, requests) if keeps else None
            prunes = self.num_pruned > 0 and self.rule.prunes(self.longest - 1, rows)
            return self.buffers.plan(layout, self.rule, decisions), prunes, decisions
        lengths = (host_seq_lens(common).tolist(), common.query_start_loc_cpu.tolist())
        steps = sequences(common, requests, self.rule)
        drafts = self.verified_rows > 1 and self.device.type != "cpu"
        whole = [drafts and not step.prefilling for step in steps]
        whole += [False] * (common.num_reqs - len(steps))
        layout, blocks = split_batch(replace(layout, lengths=lengths), size, whole)
        decisions = self.schedule.step(steps) if keeps else None
        plan = StepPlan.make(layout, self.rule, decisions)
        selects = self._selects(plan, blocks, sum(step.decoding for step in steps))
        return plan, selects, decisions

    def _decide(
        self, common: CommonAttentionMetadata, requests: StepRequests
    ) -> list[tuple[int, bool]]:
        return self.schedule.step(sequences(common, requests, self.rule))

    def _replayed_rows(self, common: CommonAttentionMetadata) -> int:
        """Rows a request of a step that vLLM may replay as one graph, 0 for other steps."""
        rows = common.max_query_len
        if common.num_reqs > self.replayed_requests:
            return 0
        if rows == 1 or rows != self.verified_rows or rows > self.config.query_block_size:
            return rows if rows == 1 else 0
        lens = common.query_start_loc_cpu.diff()
        return rows if bool(((lens == rows) | (lens == 0)).all()) else 0

    def _selects(self, plan: StepPlan, query_blocks: Tensor, num_decoding: int) -> bool:
        """Counts a step's query blocks; True if its layers have something to select."""
        blocks = query_blocks[:, 2:].tolist()
        pruned = self.num_pruned
        short = sum(not self.rule.prunes(first, rows) for rows, first in blocks)
        dense = len(self.layer_names) - pruned - self.num_local
        name = "hipserve_dense_query_blocks"
        self.tally.add("hipserve_query_blocks", len(blocks) * len(self.layer_names))
        self.tally.add(name, short * pruned, "short")
        self.tally.add(name, len(blocks) * dense, "dense_layer")
        self.tally.add(name, len(blocks) * self.num_local, "model_window")
        if short == len(blocks):
            visible = plan.layout.keys_visible or 0
            for keys in ("hipserve_keys_read", "hipserve_keys_visible"):
                self.tally.add(keys, visible if pruned else 0)
            return False
        self.tally.add("hipserve_refreshes", (num_decoding - len(plan.kept)) * pruned)
        self.tally.add("hipserve_reuses", len(plan.kept) * pruned)
        return pruned > 0


def heads_of(vllm_config: VllmConfig) -> int:
    """Query heads of this worker."""
    return vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)


def verified_rows(vllm_config: VllmConfig) -> int:
    """Rows of a request in a decode step: its last token and the drafts behind it."""
    speculative = vllm_config.speculative_config
    return 1 + (speculative.num_speculative_tokens if speculative is not None else 0)
