"""Keys and values of an engine apart from KV blocks, which hold their index only.

They are in a mapped file beside a CPU, and in host memory beside a GPU. Their pages have the ids
that vLLM gives out, so prefix hits, preemption and blocks that are used again need nothing of their
own: an index stays in its block, and its keys in their page.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hipserve.cache import HostedStore, OffloadedLayers
from hipserve.cache.host import GRANULARITY
from hipserve.cache.mapped import MappedPages
from hipserve.cache.store import ordinary_tensors
from hipserve.cache.tiles import TiledPages
from hipserve.errors import BackendError, ConfigError, FitError
from hipserve.integrations.vllm.kv_block import BlockLayout, BlockPages, index_of
from hipserve.offload import Offload, format_bytes
from hipserve.types import TileArena

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

    from hipserve.config import HiPConfig
    from hipserve.integrations.vllm.metrics import Tally


def index_only(spec: AttentionSpec, layout: BlockLayout) -> AttentionSpec:
    """The spec of blocks that hold an index: as many bytes for every token and head.

    Raises:
        BackendError: this vLLM knows only blocks of keys and values.
    """
    if "state_content_bytes" not in {field.name for field in fields(spec)}:
        raise BackendError("this vLLM has no blocks without keys and values", "use vLLM 0.32")
    item = layout.dtype.itemsize
    content = -(-layout.index_bytes // (layout.num_kv_heads * layout.block_size * item)) * item
    return replace(spec, state_content_bytes=content)


def check_blocks(
    vllm_config: VllmConfig, offload: Offload, layout: BlockLayout, layers: int
) -> int:
    """How many blocks there are, for this worker and for all others: they divide the host memory.

    Args:
        vllm_config: of the engine.
        offload: where keys and values go.
        layout: of the blocks of this worker.
        layers: of this worker.

    Raises:
        ConfigError: not said, or more than the host memory of `offload` holds; naming how many it
            does.
    """
    most = offload.host_bytes // (_of_all_workers(vllm_config, layers) * layout.content_bytes)
    given = vllm_config.cache_config.num_gpu_blocks_override
    if given is None or not 0 < given <= most:
        room = f"{format_bytes(offload.host_bytes)} of host_memory hold {most} blocks"
        expected = f"as many KV blocks as host memory holds ({room})"
        hint = f"--num-gpu-blocks-override {most}" if most else "raise host_memory"
        raise ConfigError("num_gpu_blocks_override", expected, str(given), hint)
    return given


def _of_all_workers(vllm_config: VllmConfig, layers: int) -> int:
    """Layers with keys and values in all workers: every stage of a pipeline has its own, and under
    tensor parallelism every worker has those of its stage, with its share of their heads."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        layers = vllm_config.model_config.get_total_num_hidden_layers()
    return layers * parallel.tensor_parallel_size


@dataclass(frozen=True, slots=True)
class HostedLayer:
    """One layer's keys and values apart from KV blocks.

    Attributes:
        layout: of its blocks.
        pages: keys and values.
    """

    layout: BlockLayout
    pages: HostedStore

    @property
    def tiled(self) -> TiledPages | None:
        """The pages, where a GPU holds tiles of them."""
        return self.pages if isinstance(self.pages, TiledPages) else None

    @property
    def arena(self) -> TileArena | None:
        """Tiles on a GPU."""
        return self.tiled.arena if self.tiled else None

    @property
    def last_read_bytes(self) -> int:
        """What the last step needed of a file."""
        return self.pages.last_read_bytes if isinstance(self.pages, MappedPages) else 0

    def blocks(self, kv_cache: Tensor) -> BlockPages:
        """Keys and values here, and their index in vLLM's kv_cache
        `[num_blocks, num_kv_heads, block_size, content]`, on which this is kept as in `pages_of`.
        """
        known: BlockPages | None = getattr(kv_cache, "hipserve_pages", None)
        if known is None:
            pool = self.pages.pool
            known = BlockPages(pool, index_of(kv_cache, self.layout, 0, pool.k_cache))
            kv_cache.hipserve_pages = known  # type: ignore[attr-defined]
        self.pages.index = known.index
        return known


class LoadCounter:
    """Tallies what arenas count, some steps later: nothing waits for the device.

    Args:
        arenas: of all layers.
        tally: of this process.
    """

    EVERY = 16
    """Steps between two looks."""

    def __init__(self, arenas: list[TileArena], tally: Tally) -> None:
        self._arenas, self._tally, self._steps, self._told = arenas, tally, 0, [0, 0]
        pinned = arenas[0].counts.is_cuda
        self._counts = torch.zeros(2, dtype=torch.int64, pin_memory=pinned)

    def step(self) -> None:
        """Called before every step."""
        self._steps += 1
        if self._steps % self.EVERY:
            return
        found = self._counts.tolist()  # asked for so many steps ago
        for name, now, before in zip(("needed", "loaded"), found, self._told, strict=True):
            self._tally.add(f"hipserve_tiles_{name}", now - before)
        self._told = found
        counts = torch.stack([arena.counts for arena in self._arenas]).sum((0, 1))
        self._counts.copy_(counts, non_blocking=True)


@ordinary_tensors
def host_layers(
    offload: Offload,
    layout: BlockLayout,
    config: HiPConfig,
    *,
    device: torch.device,
    layers: int,
    blocks: int,
) -> list[HostedLayer]:
    """So many layers, in the order they compute in, with the memory of so many blocks each.

    Raises:
        FitError: the disk, the host or the device has less.
    """
    nbytes = layers * (-(-blocks * layout.content_bytes // GRANULARITY) * GRANULARITY)
    offload = replace(offload, host_memory=nbytes, device_memory=offload.device_bytes)
    shape = (0, layout.num_kv_heads, layout.head_dim)
    try:
        shared = OffloadedLayers(offload, layers, config, longest=layout.keys)
        like = torch.empty(shape, dtype=layout.dtype, device=device)
        made = [shared.make_store(layout.block_size, layout.form, like) for _ in range(layers)]
        for pages in made:
            pages.hold(blocks)
    except torch.OutOfMemoryError as error:
        tiles = format_bytes(offload.device_bytes)
        needs = f"tiles of {tiles}, and two layers of {layout.keys:,} tokens that are being read"
        hint = "lower device_memory, host_memory or --max-model-len"
        raise FitError(f"the GPU has no room for {needs}", hint) from error
    return [HostedLayer(layout, pages) for pages in made]
