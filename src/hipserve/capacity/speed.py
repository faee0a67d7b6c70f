"""How fast a decode step can be at best: the bytes it reads over the bandwidth of its memory."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from hipserve.capacity.memory import BLOCK, Service
from hipserve.capacity.shape import ModelShape
from hipserve.config import HiPConfig
from hipserve.plan.parts import Part, code_parts, num_runs_of, summary_parts
from hipserve.plan.rule import pruning_rule
from hipserve.plan.runs import bound_levels, kept_runs, pruning_levels


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one decode step reads.

    Attributes:
        weights: of the model.
        keys_values: that attention reads, of all layers without a window.
        windows: of the layers with one.
        index: that searches read, on average where selections are used again.
    """

    weights: float
    keys_values: float
    windows: float
    index: float

    @property
    def total(self) -> float:
        return self.weights + self.keys_values + self.windows + self.index


def step_bytes(service: Service) -> StepBytes:
    """What a decode step at the end of the context reads, all sequences together."""
    model, config, context = service.model, service.config, service.context
    read, searched = context, 0.0
    if config is not None:
        read = keys_read(service, config)
        if read < context:
            searched = _search_bytes(model, config, context) / config.refresh_interval
    windows = sum(min(window, context) for window in model.windows if window)
    return StepBytes(
        weights=model.weights.read_by(service.sequences),
        keys_values=service.sequences * read * service.kv_token_bytes,
        windows=service.sequences * windows * model.row_bytes,
        index=service.sequences * model.full_layers * searched,
    )


def keys_read(service: Service, config: HiPConfig) -> int:
    """Keys that the last row of the context reads in a layer that may be pruned.

    Offloaded rows are pruned wherever there is more to read than they would choose.
    """
    if service.offload:
        config = config.replace(decode_dense_below=0)
    rule = pruning_rule(config, "cuda" if service.on_gpu else "cpu")
    start = rule.window_start(service.context - 1, 1)
    left = start - config.num_sink_tokens
    return service.context - left + min(left, config.budget)


def _search_bytes(model: ModelShape, config: HiPConfig, context: int) -> float:
    """What the search of one layer reads of its index, for one row."""
    code = _row_bytes(code_parts(BLOCK, model.head_dim, config.index_form), model)
    key = code or model.head_dim * model.key_bytes
    if config.run_size is None:
        stages = max(math.ceil(math.log2(context / config.budget)), 0)
        return model.num_kv_heads * 2 * config.budget * stages * key
    summary = _row_bytes(summary_parts(1, model.head_dim, config.index_form), model)
    ranked = config.budget * max(config.rerank, 1)
    every = bound_levels(BLOCK, config.run_size, num_runs_of(BLOCK, config.index_form, context))
    levels = pruning_levels(every, kept_runs(ranked, every), context)
    fine, *longer = kept_runs(ranked, levels)
    ratios = (long / short for short, long in itertools.pairwise(levels))
    runs = context / levels[-1]
    runs += sum((kept + 2) * ratio for kept, ratio in zip(longer, ratios, strict=True))
    keys = fine * levels[0] * key if config.rerank else 0
    return model.num_kv_heads * (runs * summary + keys)


def _row_bytes(parts: tuple[Part, ...], model: ModelShape) -> int:
    """One row of every part."""
    return sum(replace(part, count=1).nbytes(model.key_bytes) for part in parts)


def tokens_per_second(service: Service, bandwidth: float) -> float:
    """At most so many, of all sequences together."""
    return service.sequences * bandwidth / step_bytes(service).total


def offloaded_tokens_per_second(
    service: Service, bandwidth: float, link: float, hit_ratio: float
) -> float:
    """The same where this share of the tiles that attention reads is on the device already, and
    the others come over the link while nothing else happens."""
    read = step_bytes(service)
    loaded = (1 - hit_ratio) * read.keys_values
    return service.sequences / (read.total / bandwidth + loaded / link)
