"""Which decode steps vLLM may replay as one graph where keys and values are in host memory.

vLLM chooses the graph of a step before anyone looks at the lengths of its requests. The arena has
to have slots for all tiles of all rows of a graph, wherever these rows are: whole steps of more
requests are not captured. They run as they are, in parts that fit.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode

from hipserve.attention.crossover import rule_for
from hipserve.integrations.vllm import settings
from hipserve.integrations.vllm.compat import wrap
from hipserve.integrations.vllm.parts import Room
from hipserve.offload import slot_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def attention_layers(vllm_config: VllmConfig) -> list[Any]:
    """vLLM's attention layers of this worker."""
    every: Any = vllm_config.compilation_config.static_forward_context
    return [x for x in every.values() if hasattr(x, "impl") and hasattr(x, "kv_cache")]


def room_of(vllm_config: VllmConfig) -> Room | None:
    """What rows may read of the arena of a layer; None where keys and values are not in host
    memory. vLLM asks before the arenas are made."""
    offload = settings.offload_of(vllm_config)
    if offload is None or offload.file is not None:
        return None
    layers, config = attention_layers(vllm_config), settings.hip_config(vllm_config)
    impl, model = layers[0].impl, vllm_config.model_config
    slot = slot_bytes(impl.num_kv_heads, impl.head_size, model.dtype.itemsize)
    device = torch.device(vllm_config.device_config.device_type)
    group = max(impl.num_heads // impl.num_kv_heads, 1)
    return Room(
        slots=offload.device_bytes // len(layers) // slot,
        lists=config.lists_of(group),
        config=config,
        rule=rule_for(config, device, model.dtype, impl.head_size, group),
        longest=model.max_model_len,
    )


@functools.cache
def limit_graphs() -> None:
    """Lets both model runners capture whole steps of no more requests than there are tiles for.

    vLLM has one list of sizes for all graphs: to shorten it would leave pieces of larger steps
    without graphs too.
    """
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    wrap(CudagraphDispatcher, "initialize_cudagraph_keys", keeping_what_fits)
    if (second := sys.modules.get("vllm.v1.worker.gpu.cudagraph_utils")) is not None:
        wrap(second.CudaGraphManager, "_init_candidates", making_what_fits)


def keeping_what_fits(initialize: Callable[..., None]) -> Callable[..., None]:
    """Of the first model runner."""

    @functools.wraps(initialize)
    def initialize_cudagraph_keys(dispatcher: Any, *positional: Any, **named: Any) -> None:
        initialize(dispatcher, *positional, **named)
        room, keys = room_of(dispatcher.vllm_config), dispatcher.cudagraph_keys
        if room is not None:
            whole = CUDAGraphMode.FULL
            keys[whole] = {key for key in keys[whole] if key.num_reqs <= room.rows}

    return initialize_cudagraph_keys


def making_what_fits(initialize: Callable[..., None]) -> Callable[..., None]:
    """Of the second model runner, which makes no whole graph for more requests than it may have."""

    @functools.wraps(initialize)
    def init_candidates(manager: Any) -> None:
        room, most = room_of(manager.vllm_config), manager.max_num_reqs
        manager.max_num_reqs = most if room is None else min(most, room.rows)
        try:
            initialize(manager)
        finally:
            manager.max_num_reqs = most

    return init_candidates
