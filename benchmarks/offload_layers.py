"""Layers of an 8B model's shape on memory of either kind, for `benchmarks/offload.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hipserve.attention.dense import attend_chosen
from hipserve.cache.store import PageStore, Write
from hipserve.config import HiPConfig
from hipserve.ops import refresh_blocks, select_blocks
from hipserve.plan import BatchLayout, pruning_rule
from hipserve.types import BlockSelection

KV_HEADS, GROUP, DIM, PAGE = 8, 4, 128, 256
HIDDEN, MLP, VOCABULARY, ALL_LAYERS = 4096, 14336, 128256, 32
TOPICS = 64
ROOM = 4096
"""Keys of a sequence for which there is room behind its text."""


@dataclass
class Batch:
    """Sequences of equal length, as kernels see them."""

    length: int
    count: int
    device: torch.device

    def __post_init__(self) -> None:
        self.per_seq = -(-(self.length + ROOM) // PAGE)
        ids = torch.arange(self.count * self.per_seq).view(self.count, -1)
        self.tables: list[list[int]] = ids.tolist()
        self.table = ids.int().to(self.device)
        self.slots = self.table.long()[:, self.length // PAGE] * PAGE + self.length % PAGE
        self.layout = BatchLayout.of(self.table, [self.length + 1] * self.count, [1] * self.count)

    def writes(self, begin: int, end: int) -> list[Write]:
        """What all sequences append at the positions [begin, end)."""
        return [Write(table, begin, end) for table in self.tables]


def topics(generator: torch.Generator, device: torch.device) -> Tensor:
    """`[TOPICS, KV_HEADS, DIM]`: directions that keys and queries share."""
    made = torch.randn(TOPICS, KV_HEADS, DIM, generator=generator, device=device)
    return made / made.norm(dim=-1, keepdim=True) * math.sqrt(DIM)


def keys_of(of: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`[count, KV_HEADS, DIM]`: stretches of 64 keys about one topic each, and noise."""
    stretch = torch.randint(TOPICS, (-(-count // 64),), generator=generator, device=of.device)
    about = stretch.repeat_interleave(64)[:count]
    noise = torch.randn(count, KV_HEADS, DIM, generator=generator, device=of.device)
    return 0.4 * of[about] + noise


THEME, WORDS, NEW = 0.84, 64, 0.14
"""Share of a sequence's theme in its queries, how many words follow, and the share of what is new:
so a cache of 64, 256, 1,024 blocks a head hits .27, .65, .93 at 128k, and one in four repeats
from step to step. A trained model on text had .34, .69, .93 and one in three."""


def recurring(of: Tensor, count: int, steps: int) -> Tensor:
    """`[steps, count, KV_HEADS * GROUP, DIM]`: queries of texts, in which words recur."""
    g = torch.Generator(of.device).manual_seed(2)

    def fresh(n: int) -> Tensor:
        about = torch.randint(TOPICS, (n, count), generator=g, device=of.device)
        shape = (n, count, KV_HEADS, GROUP, DIM)
        return 0.6 * of[about][:, :, :, None] + torch.randn(shape, generator=g, device=of.device)

    words = THEME * fresh(1) + math.sqrt(1 - THEME**2) * fresh(WORDS)
    often = 1 / torch.arange(1, WORDS + 1, device=of.device)
    said = torch.multinomial(often.expand(count, -1), steps, replacement=True, generator=g)
    known = words[said.T, torch.arange(count, device=of.device)]  # [steps, count, ...]
    queries = [math.sqrt(1 - NEW**2) * q + NEW * fresh(1)[0] for q in known]
    return torch.stack(queries).flatten(2, 3)


class Matrices:
    """The matrix products of such a model, with random weights: what takes time beside attention.

    Args:
        layers: that have weights of their own.
        like: their dtype and device.
    """

    def __init__(self, layers: int, like: Tensor) -> None:
        heads = KV_HEADS * GROUP
        shapes = [(HIDDEN, (heads + 2 * KV_HEADS) * DIM), (heads * DIM, HIDDEN)]
        shapes += [(HIDDEN, 2 * MLP), (MLP, HIDDEN)]
        self._layers = [[self._random(*shape, like) for shape in shapes] for _ in range(layers)]
        self._last = self._random(HIDDEN, VOCABULARY * layers // ALL_LAYERS, like)
        self._embedding = torch.empty_like(self._last)  # takes memory, and no time

    @staticmethod
    def _random(rows: int, columns: int, like: Tensor) -> Tensor:
        made = torch.randn(rows, columns, dtype=like.dtype, device=like.device)
        return made.mul_(rows**-0.5)

    def before(self, layer: int, x: Tensor) -> None:
        """Queries, keys and values of x `[rows, HIDDEN]`."""
        x @ self._layers[layer][0]

    def behind(self, layer: int, x: Tensor, out: Tensor) -> Tensor:
        """The next x `[rows, HIDDEN]`, of the attention's out `[rows, heads, DIM]`."""
        _, attended, up, down = self._layers[layer]
        x = x + out.flatten(1) @ attended
        return x + (x @ up)[:, :MLP] @ down

    def logits(self, x: Tensor) -> None:
        """Of the last rows, x `[rows, HIDDEN]`."""
        x @ self._last


class Layers:
    """The layers of a model on one kind of memory.

    The queries of a layer are those given, shifted by what the layer before returned.
    """

    def __init__(
        self, stores: list[PageStore], batch: Batch, backend: str, matrices: Matrices | None
    ) -> None:
        self.stores, self.batch, self.backend, self.matrices = stores, batch, backend, matrices
        self.due = torch.ones(batch.count, dtype=torch.int32, device=batch.device)

    def configure(self, config: HiPConfig) -> None:
        """Steps search with `config` from here on."""
        self.config, self.rule, batch = config, pruning_rule(config, "cuda"), self.batch
        kept = torch.full((batch.count, KV_HEADS, config.max_selected), -1).int()
        self.kept = [
            BlockSelection(kept.to(batch.device).clone(), torch.zeros_like(batch.table[:, 0]))
            for _ in self.stores
        ]

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A decode step; q `[count, heads, DIM]`, k and v `[layers, count, KV_HEADS, DIM]`."""
        batch, writes = self.batch, self.batch.writes(self.batch.length, self.batch.length + 1)

        def choose(i: int, rows: Tensor) -> BlockSelection:
            store = self.stores[i]
            if self.config.refresh_interval == 1:
                return self._select(rows, store, batch.layout)
            refresh_blocks(
                rows,
                store.index,
                batch.layout,
                self.kept[i],
                self.due,
                config=self.config,
                rule=self.rule,
                backend=self.backend,
            )
            return self.kept[i]

        return self._forward(q, k, v, batch.slots, writes, batch.layout, choose)

    def read(self, q: Tensor, k: Tensor, v: Tensor, begin: int, end: int) -> Tensor:
        """The positions [begin, end) of the first sequence, what comes before being there.

        q `[rows, heads, DIM]`, k and v `[layers, rows, KV_HEADS, DIM]`.
        """
        batch, rows = self.batch, end - begin
        slots = torch.arange(begin, end, device=q.device)
        layout = BatchLayout.of(batch.table[:1], [end], [rows])
        prunes = layout.may_prune(self.rule)

        def choose(i: int, rows: Tensor) -> BlockSelection | None:
            return self._select(rows, self.stores[i], layout) if prunes else None

        return self._forward(q, k, v, slots, [Write(batch.tables[0], begin, end)], layout, choose)

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        writes: list[Write],
        layout: BatchLayout,
        choose: Callable[[int, Tensor], BlockSelection | None],
    ) -> Tensor:
        out, matrices = q, self.matrices
        x = q.flatten(1)
        for i, store in enumerate(self.stores):
            if matrices:
                matrices.before(i, x)
            store.write(k[i], v[i], slots, writes)
            selection = choose(i, out)
            pool = store.fetch(selection, layout, self.config, self.rule)
            options: dict[str, Any] = {"config": self.config, "backend": self.backend}
            out = q + 0.1 * attend_chosen(out, pool, layout, selection, **options)[0]
            if matrices:
                x = matrices.behind(i, x, out)
        if matrices:
            matrices.logits(x[-len(writes) :])
        return out

    def _select(self, q: Tensor, store: PageStore, layout: BatchLayout) -> BlockSelection:
        options: dict[str, Any] = {"config": self.config, "rule": self.rule}
        return select_blocks(q, store.index, layout, check=False, backend=self.backend, **options)
