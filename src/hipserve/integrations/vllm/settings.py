"""What vLLM's configuration says to HiP attention, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from hipserve.config import HiPConfig
from hipserve.errors import ConfigError
from hipserve.integrations.vllm import OPTIONS_KEY
from hipserve.types import bound_levels, bound_offsets

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BLOCK_SIZE = 256
"""Tokens of a KV block unless the user says otherwise: it carries all bound levels."""

CACHE_LINE = 64


def hip_config(vllm_config: VllmConfig) -> HiPConfig:
    """The HiPConfig of an engine.

    Raises:
        ConfigError: an unknown key, or a value out of range.
    """
    options = cast("Any", vllm_config.additional_config)
    values = options.get(OPTIONS_KEY, {}) if isinstance(options, dict) else {}
    if not isinstance(values, dict):
        raise ConfigError(
            "additional_config",
            'a table of options, {"hip": {"budget": 1024}}',
            repr(values),
            "use the keys of HiPConfig",
        )
    return HiPConfig.from_dict(cast("dict[str, Any]", values))


def check(vllm_config: VllmConfig) -> None:
    """Refuses what HiP attention cannot do, before a model is loaded.

    Raises:
        ConfigError: naming the option.
    """
    config = hip_config(vllm_config)
    check_block_size(vllm_config.cache_config.block_size, config)
    dtype = vllm_config.cache_config.cache_dtype
    if dtype not in ("auto", "float16", "bfloat16", "float32"):
        hint = "leave it out, or use another attention backend"
        raise ConfigError("kv_cache_dtype", "keys and values as the model computes", dtype, hint)
    if config.uses_bounds and vllm_config.kv_transfer_config is not None:
        raise ConfigError(
            "kv_transfer_config",
            "none: a connector moves keys without the bounds that the selector reads",
            vllm_config.kv_transfer_config.kv_connector or "a connector",
            'set {"hip": {"selector": "tree"}}, or serve without a connector',
        )


def check_block_size(block_size: int, config: HiPConfig) -> None:
    """Raises ConfigError where runs of keys would straddle KV blocks."""
    longest = bound_levels(block_size, config.bound_block_size)[-1]
    if config.uses_bounds and block_size % longest:
        raise ConfigError(
            "block_size",
            f"a multiple of {longest} (runs of {config.bound_block_size} keys and their parents)",
            str(block_size),
            "use a power of two such as 128 or 256",
        )


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One layer's part of a KV block: rows of keys and values, then the bounds of its runs.

    A row holds the keys and then the values of one token and head, as vLLM's GPU backends have it.
    Bounds lie in the padding at the end, so that the block manager counts, shares and frees them
    with the keys they belong to.
    """

    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    bound_block_size: int | None

    @property
    def num_runs(self) -> int:
        if self.bound_block_size is None:
            return 0
        return bound_offsets(self.block_size, self.bound_block_size)[-1]

    @property
    def row(self) -> int:
        """Elements of one token's keys and values, and likewise of one run's bounds."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def bound_bytes(self) -> int:
        size = self.num_runs * self.row * self.dtype.itemsize
        return -(-size // CACHE_LINE) * CACHE_LINE

    @property
    def padded_bytes(self) -> int:
        return self.block_size * self.row * self.dtype.itemsize + self.bound_bytes
