"""How many tokens a KV block holds on a GPU, unless the user says.

Large blocks make the search faster: 256 and 128 tokens carry runs of 128 keys, 64 tokens shorter
ones, fewer tokens none but the finest. But vLLM measures CUDA graphs with a cache of one block for
every sequence that it captures, next to the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hipserve.integrations.vllm.limits import BLOCK_SIZE, FP8_CACHES
from hipserve.integrations.vllm.settings import hip_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SIZES = (BLOCK_SIZE, 128, 64, 32, 16)

PROFILE_SHARE = 8
"""The cache that graphs are measured with takes up to one part in so many of the card."""

INDEX_BYTES = {16: 1.095, 8: 1.31, 4: 1.19}
"""Maximum ratio of the bytes of a block with its index and without, by bits of a code, where keys
have 16 bits: with 64 tokens, and sequences of up to 8M of them."""


def of_engine(vllm_config: VllmConfig, memory: int) -> int:
    """The block size for a card of `memory` bytes."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    heads, dim = model.get_num_kv_heads(parallel), model.get_head_size()
    fp8 = vllm_config.cache_config.cache_dtype in FP8_CACHES
    itemsize = 1 if fp8 else model.dtype.itemsize
    token = 2 * heads * dim * itemsize * model.get_num_layers(parallel)
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    if vllm_config.cache_config.kv_cache_memory_bytes:  # then vLLM measures nothing
        captured = 0
    captured = min(vllm_config.scheduler_config.max_num_seqs, captured)
    return largest(token, captured, memory, hip_config(vllm_config).code_bits, fp8=fp8)


def largest(
    token_bytes: int, captured: int, memory: int, code_bits: int = 16, *, fp8: bool = False
) -> int:
    """The largest block size whose measuring cache fits.

    Args:
        token_bytes: keys and values of a token, of all layers of a GPU.
        captured: sequences of the largest graph.
        memory: bytes of the card.
        code_bits: as in `HiPConfig`.
        fp8: keys and values are in fp8, beside which an index is as large as beside 16 bits.
    """
    fits = (
        size
        for size in SIZES
        if measuring_bytes(token_bytes, captured, size, code_bits, fp8=fp8)
        <= memory / PROFILE_SHARE
    )
    return next(fits, SIZES[-1])


def measuring_bytes(
    token_bytes: int, captured: int, block_size: int, code_bits: int = 16, *, fp8: bool = False
) -> float:
    """Bytes of the cache that vLLM measures graphs with."""
    index = (INDEX_BYTES[code_bits] - 1) * (2 if fp8 else 1)
    return token_bytes * captured * block_size * (1 + index)
