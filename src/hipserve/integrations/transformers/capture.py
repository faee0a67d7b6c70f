"""Decode steps of a transformers model on a GPU: recorded once, then replayed as a CUDA graph."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from hipserve.attention import RequestSelections
from hipserve.cache.store import ordinary_tensors
from hipserve.cache.tiles import TiledPages
from hipserve.cache.transfers import sent
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.integrations.transformers.cache import HiPCache
from hipserve.integrations.transformers.keys import CapturedKeys
from hipserve.integrations.transformers.masks import MaskDescription
from hipserve.integrations.transformers.registration import Registered
from hipserve.integrations.transformers.room import StepRoom, in_reach, memory_of
from hipserve.integrations.transformers.settings import NAME, config_of
from hipserve.plan import BatchLayout, CapturedPlan, DecodeBuffers, RefreshSchedule, SequenceStep
from hipserve.types import BlockSelection

logger: Any = logging.get_logger(__name__)
Call = Callable[[], Any]
Recorder = Callable[[Call], Call]
"""Takes a call and returns one that repeats its launches and returns the same tensors."""

FIRST_STEPS = 8
"""Steps of a cache that run before one is recorded, which takes as long as several: a short answer
does without."""

OPTIONS = bool | int | str | None
"""What a recorded call may be passed besides the tensors of a step."""


def capture_decode(model: Any, record: Recorder | None = None) -> Any:
    """Records the decode steps of a model with a `HiPCache` as CUDA graphs, and returns the model.

    Without it the host launches some hundred kernels a step, which takes longer than the GPU needs
    for one sequence. Nothing else changes: `model(...)` and `model.generate(...)` are called as
    before. A step is recorded where every sequence has one new token, every layer keeps its keys in
    pages in the model's memory, or in host memory with room in `device_memory` for all that rows
    may read (no layer has a window of its own), `extend` is not "stream" and gradients are off; it
    is recorded again when a cache gets more memory, and for every new cache: exchange modules, such
    as adapters, between caches and not within one. All other calls, such as prompts, run as before.
    `del model.forward` undoes it.

    Args:
        model: a transformers model with `attn_implementation="hip"` on a GPU.
        record: how a step is recorded; a CUDA graph if None.

    Raises:
        ArgumentError: the model is not on one GPU.
    """
    if record is None:
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            found = ", ".join(sorted(map(str, devices)))
            raise ArgumentError("model", "a model on one GPU", f"one on {found}")
    capture = _Capture(model.forward, model.config.get_text_config(decoder=True), record or _graph)

    @functools.wraps(model.forward)
    def forward(*args: Any, **options: Any) -> Any:
        return capture(*args, **options)

    model.forward = forward
    return model


def _graph(call: Call) -> Call:
    """A CUDA graph of what `call` launches; it runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = call()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


class _Capture:
    """The forward call of one model, and how its steps are recorded."""

    def __init__(self, forward: Callable[..., Any], config: Any, record: Recorder) -> None:
        self.forward, self.config = forward, config
        self.record: Recorder | None = record

    def __call__(self, *args: Any, **options: Any) -> Any:
        asked = self._decode_step(*args, **options)
        if asked is None:
            return self.forward(*args, **options)
        step, cache, ids, positions = asked
        return step.run(cache, ids, positions)

    def _decode_step(
        self,
        input_ids: Any = None,
        *args: Any,
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        **options: Any,
    ) -> tuple[DecodeStep, HiPCache, Tensor, Tensor | None] | None:
        """The step to run, its cache, tokens and positions; None where nothing is recorded."""
        plain = not args and inputs_embeds is None and labels is None
        if (
            self.record is None
            or not plain
            or not isinstance(input_ids, Tensor)
            or input_ids.shape[1:] != (1,)
        ):
            return None
        if not isinstance(past_key_values, HiPCache) or torch.is_grad_enabled():
            return None
        if not isinstance(AttentionInterface().get(NAME), Registered):  # someone watches every call
            return None
        if not all(isinstance(value, OPTIONS) for value in options.values()):
            return None
        if position_ids is not None and position_ids.ndim != 2:  # positions of several axes
            return None
        cache = past_key_values
        if not in_reach(cache, input_ids) or not _hides_nothing(cache, attention_mask, input_ids):
            return None
        config = config_of(self.config)
        if self.config._attn_implementation != NAME or config.streams:
            return None
        cache.reserve_step()
        key = (config, options)
        step = cache.recorded
        if not isinstance(step, DecodeStep) or not step.fits(self, cache, key):
            room = StepRoom.of(cache, config, self.config.num_attention_heads)
            if room is None:
                return None
            cache.recorded = step = None  # frees the memory of the former graph first
            cache.recorded = step = DecodeStep(self, cache, key, room)
        return step, cache, input_ids, position_ids

    def refuse(self, error: Exception) -> None:
        """No step of this model is recorded any more."""
        self.record = None
        logger.warning_once(f"decode steps of this model are not captured: {error}")


def _hides_nothing(cache: HiPCache, mask: Any, ids: Tensor) -> bool:
    """The mask, 2-D or None, lets the new tokens count, and hides what the cache left out."""
    if not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
        return False
    held = cache.paged_layers[0].seen
    described = MaskDescription(
        batch_size=len(ids),
        q_length=1,
        kv_length=held + 1,
        q_offset=held,
        kv_offset=0,
        sliding_window=0,
        key_valid=mask,
    )
    described.check_held(held, cache.paged_layers[0].padded)
    return described.valid_rows(held + 1, 1, ids.device) is None


@dataclass(slots=True)
class _Counter:
    """Counts the keys that pruned layers read in a step, on the device: `KeyCounter`.

    Attributes:
        total: `[]` float64, all steps so far.
    """

    total: Tensor
    _chosen: list[BlockSelection] = field(default_factory=list[BlockSelection])

    def add(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,  # noqa: ARG002
        config: HiPConfig,  # noqa: ARG002
    ) -> None:
        """As `KeyCounter.add`; what reads everything is counted by the host."""
        if selection is not None:
            self._chosen.append(selection)

    def add_dense(self, batch: int, rows: int) -> None:
        """Not called: pages are read."""

    def add_seconds(self, search: float, attention: float) -> None:
        """Does nothing: a graph keeps no time."""

    def count(self, plan: CapturedPlan, config: HiPConfig) -> None:
        """Adds what the layers of this step chose."""
        if not self._chosen:
            return
        indices = torch.cat([selection.indices for selection in self._chosen])
        starts = torch.cat([selection.window_start for selection in self._chosen])
        blocks = plan.layout.query_blocks(config.query_block_size)
        every = blocks.repeat(len(self._chosen), 1)
        self.total += BlockSelection(indices, starts).keys_of(every, config)[0]
        self._chosen.clear()


class DecodeStep:
    """One recorded step: a new token of every sequence of a cache.

    What a replay reads is written to tensors that stay where they are; the pages that the graph
    reads and writes have to stay as well, so that a cache that grows is recorded again. The cache
    holds its step, and not the other way round: both are freed with the last use of the cache.

    Args:
        capture: the model's call, and how it is recorded.
        cache: holds the sequences, with room for the step.
        key: configuration and options of the call.
        room: how far the cache may grow.
    """

    @ordinary_tensors
    def __init__(
        self, capture: _Capture, cache: HiPCache, key: tuple[Any, ...], room: StepRoom
    ) -> None:
        self.capture, self.key = capture, key
        self.config: HiPConfig = key[0]
        layers = cache.paged_layers
        first = layers[0].pages
        # Weak: memory that a cache gives up when it grows is free at once.
        self.memory = [weakref.ref(memory_of(layer.pages.store)) for layer in layers]
        batch, device = len(first.lengths), room.device
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.slots = torch.zeros(batch, dtype=torch.int64, device=device)
        self.layout = BatchLayout(
            torch.zeros(batch, room.columns, **ints),
            torch.zeros(batch, **ints),
            torch.arange(batch + 1, **ints),
        )
        self.rule, self.row_tiles = room.rule, room.row_tiles
        self.prunes = self.rule.prunes(room.columns * first.page_size - 1, 1)
        self.buffers = DecodeBuffers(batch, device)
        self.schedule = RefreshSchedule(batch, self.config.refresh_interval)
        self.requests = [RequestSelections(batch) for _ in layers]
        self.counter = _Counter(cache.captured_read(device))
        self.num_pruned = len(layers) - len({*self.config.dense_layers} & {*range(len(layers))})
        self._table: Tensor | None = None
        self._num_orders = layers[0].num_orders
        self._num_steps = 0
        self._replay: Call | None = None

    def fits(self, capture: _Capture, cache: HiPCache, key: tuple[Any, ...]) -> bool:
        """The recorded launches are those that this call needs, and its memory is there."""
        pages = [layer.pages for layer in cache.paged_layers]
        stores = zip(pages, self.memory, strict=True)
        return (
            (capture, key) == (self.capture, self.key)
            and len(pages[0].lengths) == len(self.ids)
            and pages[0].block_table.shape[1] <= self.layout.block_table.shape[1]
            and all(memory_of(p.store) is held() for p, held in stores)
        )

    def run(self, cache: HiPCache, ids: Tensor, positions: Tensor | None) -> Any:
        """The model's output for one new token of every sequence.

        Args:
            cache: the one that this step was made for.
            ids: `[batch, 1]` int64.
            positions: the same shape, or `[1, 1]`; None for the number of tokens before.
        """
        self._write(cache, ids, positions)
        if self._replay is not None:
            out = self._replay()
        else:
            out = self._forward(cache)
            self._record(cache)
        lengths = cache.advance_step()
        cache.count_captured(self.num_pruned * sum(lengths), everything=not self.prunes)
        # The next replay overwrites the tensors of this one.
        return _each(out, lambda x: x.clone() if isinstance(x, Tensor) else _put(x, cache))

    def _record(self, cache: HiPCache) -> None:
        """Records the step that ran last, if more are likely to follow."""
        self._num_steps += 1
        record = self.capture.record
        if record is None or self._num_steps < FIRST_STEPS:
            return
        try:
            self._replay = record(lambda: self._forward(cache))
        except RuntimeError as error:  # the model waits for the device somewhere
            self.capture.refuse(error)

    def _write(self, cache: HiPCache, ids: Tensor, positions: Tensor | None) -> None:
        """What the launches of the next step read."""
        for layer in cache.paged_layers:
            if isinstance(layer.pages.store, TiledPages):
                layer.pages.store.settle()
        first = cache.paged_layers[0]
        table = first.pages.block_table
        if table is not self._table:
            if not all(first.pages.shares_table(x.pages) for x in cache.paged_layers):
                raise RuntimeError("layers of one cache keep the same tokens in different pages")
            self._table = table
            self.layout.block_table[:, : table.shape[1]] = table
        if first.num_orders != self._num_orders:  # then all select again
            self._num_orders = first.num_orders
            self.schedule.forget(range(len(ids)))
        lengths = [n + 1 for n in first.pages.lengths]
        self.layout.seq_lens.copy_(sent(lengths, ids.device))
        self.ids.copy_(ids)
        if positions is None:
            self.positions.fill_(first.seen)
        else:
            self.positions.copy_(positions)
        if self.config.refresh_interval > 1:
            steps = [SequenceStep(i, n, self.rule.prunes(n - 1, 1)) for i, n in enumerate(lengths)]
            self.buffers.decide(self.schedule.step(steps), len(ids))

    def _forward(self, cache: HiPCache) -> Any:
        """One step of the model, over tensors that stay where they are."""
        page_size = cache.paged_layers[0].pages.page_size
        plan = self.buffers.plan(self.layout, self.rule)
        last = self.layout.seq_lens.long()[:, None] - 1
        page = self.layout.block_table.gather(1, last // page_size)
        self.slots.copy_((page * page_size + last % page_size)[:, 0])
        keys = [
            CapturedKeys(
                layer,
                self.slots,
                plan,
                prunes=self.prunes,
                row_tiles=self.row_tiles,
                requests=requests,
                counter=self.counter,
            )
            for layer, requests in zip(cache.paged_layers, self.requests, strict=True)
        ]
        with cache.captured(keys):
            out = self.capture.forward(
                input_ids=self.ids,
                position_ids=self.positions,
                past_key_values=cache,
                attention_mask=None,
                **self.key[1],
            )
        self.counter.count(plan, self.config)
        return _each(out, lambda x: THE_CACHE if x is cache else x)


THE_CACHE = object()
"""Stands for the cache in an output that is kept."""


def _put(x: Any, cache: HiPCache) -> Any:
    return cache if x is THE_CACHE else x


def _each(out: Any, change: Callable[[Any], Any]) -> Any:
    """A model's output with every entry changed."""
    if isinstance(out, ModelOutput):
        return type(out)(**{name: _each(value, change) for name, value in out.items()})
    if isinstance(out, tuple | list):
        return type(out)(_each(x, change) for x in out)
    return change(out)
