"""Keys and values of an engine on a CPU in a mapped file: KV blocks hold their index only.

The blocks of the file have the ids that vLLM gives out, so prefix hits, preemption and blocks that
are used again need nothing of their own: an index stays in its block, and its keys in theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hipserve.cache.host import GRANULARITY, MappedFile
from hipserve.cache.mapped import MappedPages
from hipserve.errors import BackendError, ConfigError
from hipserve.integrations.vllm.kv_block import BlockLayout, BlockPages, index_of
from hipserve.offload import Offload, format_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec


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
    """How many blocks there are.

    Raises:
        ConfigError: not said, or more than the host memory of `offload` holds; naming how many it
            does.
    """
    most = offload.host_bytes // (layers * layout.content_bytes)
    given = vllm_config.cache_config.num_gpu_blocks_override
    if given is None or not 0 < given <= most:
        room = f"{format_bytes(offload.host_bytes)} of host_memory hold {most} blocks"
        expected = f"as many KV blocks as host memory holds ({room})"
        hint = f"--num-gpu-blocks-override {most}" if most else "raise host_memory"
        raise ConfigError("num_gpu_blocks_override", expected, str(given), hint)
    return given


@dataclass(frozen=True, slots=True)
class HostedLayer:
    """One layer's keys and values in a mapped file.

    Attributes:
        layout: of its blocks.
        pages: keys and values.
    """

    layout: BlockLayout
    pages: MappedPages

    @classmethod
    def make(cls, offload: Offload, layout: BlockLayout, num_blocks: int) -> HostedLayer:
        """Takes the space of all blocks on the disk.

        Raises:
            FitError: the disk has less.
        """
        assert offload.file is not None
        nbytes = num_blocks * layout.content_bytes
        nbytes = -(-nbytes // GRANULARITY) * GRANULARITY
        memory = MappedFile(offload.file, nbytes).stretch(0, nbytes)
        memory.reserve(nbytes)
        like = torch.empty(0, layout.num_kv_heads, layout.head_dim, dtype=layout.dtype)
        return cls(layout, MappedPages(layout.block_size, layout.form, like, memory))

    def blocks(self, kv_cache: Tensor) -> BlockPages:
        """Keys and values in the file, and the index in vLLM's kv_cache
        `[num_blocks, num_kv_heads, block_size, content]`."""
        pool = self.pages.pool
        return BlockPages(pool, index_of(kv_cache, self.layout, 0, pool.k_cache))
