"""What a server keeps in memory for so many sequences of such a context, and what fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from hipserve.capacity.cards import CHUNK
from hipserve.capacity.scratch import scratch_bytes
from hipserve.capacity.shape import ModelShape
from hipserve.config import DEFAULT, HiPConfig
from hipserve.offload import STAGED_LAYERS, slot_bytes, table_bytes, tiles_of_rows
from hipserve.plan.parts import index_bytes

BLOCK = 256
"""Tokens of a KV block, as `hipserve serve` sets it."""

RESERVE = 2**30
"""For CUDA's context and graphs, or the processes of a server on a CPU."""

MOST_TOKENS = 2**31


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes on the device that computes, and in the pool on the host.

    Attributes:
        weights: of the model.
        keys_values: of layers that read every key, where they are resident.
        index: of their keys.
        windows: keys and values of layers with a sliding window.
        activations: what one step allocates.
        reserve: `RESERVE`.
        table: with offload: where each tile lies.
        staging: with offload: two layers of the context that is being read.
        arena: with offload: tiles on the device, at the least what one step reads.
        pool: keys and values on the host, with offload: those of all cards that share the model.
    """

    weights: int
    keys_values: int
    index: int
    windows: int
    activations: int
    reserve: int = RESERVE
    table: int = 0
    staging: int = 0
    arena: int = 0
    pool: int = 0

    @property
    def device(self) -> int:
        """All but the pool."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.pool


@dataclass(frozen=True, slots=True)
class Service:
    """What is to be served.

    Attributes:
        model: its shape; that of one card's part where several share it.
        config: how attention is pruned; None for dense attention, which has no index.
        context: tokens of a sequence, prompt and answer together.
        sequences: at once.
        chunk: tokens that one step reads at most.
        offload: keys and values live on the host.
        on_gpu: computed by a GPU, whose kernels need scratch, and whose tiles need an arena.
        cards: that share the model (tensor parallelism).
    """

    model: ModelShape
    config: HiPConfig | None
    context: int
    sequences: int = 1
    chunk: int = CHUNK
    offload: bool = False
    on_gpu: bool = True
    cards: int = 1

    @property
    def rows(self) -> int:
        """Tokens of a sequence in whole KV blocks."""
        return -(-self.context // BLOCK) * BLOCK

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, and of the block that vLLM keeps empty."""
        return self.sequences * self.rows + BLOCK

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of a token in the layers that read every key."""
        return self.model.full_layers * self.model.row_bytes

    @property
    def index_token_bytes(self) -> float:
        """The index of that token."""
        if self.config is None:
            return 0
        model = self.model
        page = index_bytes(
            BLOCK,
            model.num_kv_heads,
            model.head_dim,
            key_bytes=model.key_bytes,
            form=self.config.index_form,
            keys=self.context,
        )
        return model.full_layers * page / BLOCK

    @property
    def step_tiles(self) -> int:
        """Tiles that a row of a decode step reads of one head: sinks, choice and window."""
        config = self.config or DEFAULT
        return tiles_of_rows(
            config.num_sink_tokens,
            config.max_selected * config.key_block_size,
            config.sliding_window,
            config.granularity,
            config.refresh_interval,
        )

    @property
    def arena_floor(self) -> int:
        """Bytes of the tiles that one step of all sequences reads."""
        model = self.model
        slot = slot_bytes(model.num_kv_heads, model.head_dim, model.key_bytes)
        group = model.num_heads // model.num_kv_heads
        tiles = self.step_tiles * (self.config.lists_of(group) if self.config else 1)
        return self.sequences * tiles * model.full_layers * slot

    def parts(self) -> Parts:
        """What it takes."""
        model, kv = self.model, self.tokens * self.kv_token_bytes
        parts = Parts(
            weights=math.ceil(model.weights.nbytes),
            keys_values=kv,
            index=math.ceil(self.tokens * self.index_token_bytes),
            windows=self._window_bytes(),
            activations=self._activations(),
        )
        if not self.offload:
            return parts
        parts = replace(parts, keys_values=0, pool=self.cards * kv)
        if not self.on_gpu:
            return parts
        pages = model.full_layers * self.tokens // BLOCK
        return replace(
            parts,
            table=pages * table_bytes(model.num_kv_heads, BLOCK),
            staging=STAGED_LAYERS * self.rows * model.row_bytes,
            arena=min(self.arena_floor, kv),
        )

    def _window_bytes(self) -> int:
        """vLLM keeps the blocks of a window and of the chunk that is being read."""
        model = self.model
        held = (-(-(window - 1 + self.chunk) // BLOCK) + 1 for window in model.windows if window)
        blocks = sum(min(count, self.rows // BLOCK) for count in held)
        return self.sequences * blocks * BLOCK * model.row_bytes

    def _activations(self) -> int:
        """Rows of a chunk between and inside layers, logits, and the scratch of a search."""
        model = self.model
        rows = self.chunk * (8 * model.hidden + 3 * model.intermediate) * model.itemsize
        logits = self.sequences * model.vocabulary * (model.itemsize + 4)
        if not self.on_gpu or self.config is None:
            return rows + logits
        shape = (model.num_heads, model.head_dim, model.itemsize)
        return rows + logits + scratch_bytes(self.chunk, *shape, self.config)


def index_per_token(config: HiPConfig, shape: ModelShape) -> str:
    """Bytes of the index of a token, and their share of its keys and values."""
    service = Service(shape, config, BLOCK)
    share = service.index_token_bytes / service.kv_token_bytes
    codes = "" if config.code_bits == 16 else f" with codes of {config.code_bits} bits"
    return f"{service.index_token_bytes:,.0f} bytes a token, {share:.1%} of keys and values{codes}"


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that a server may take.

    Attributes:
        device: bytes of the device that computes.
        host: bytes for the pool.
    """

    device: int
    host: int

    def holds(self, service: Service) -> bool:
        """It fits."""
        parts = service.parts()
        return parts.device <= self.device and parts.pool <= self.host

    def longest_context(self, service: Service) -> int:
        """The longest context of as many sequences, in whole KV blocks; 0 where none fits."""

        def fits(blocks: int) -> bool:
            return self.holds(replace(service, context=blocks * BLOCK))

        return BLOCK * _largest(fits, MOST_TOKENS // BLOCK)

    def most_sequences(self, service: Service) -> int:
        """Sequences of this context at once; 0 where not even one fits."""
        return _largest(lambda count: self.holds(replace(service, sequences=count)), 2**16)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where smaller ones fit too; 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
