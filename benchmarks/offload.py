"""Decoding and reading with keys and values in host memory, compared with the same on the GPU.

    python benchmarks/offload.py                    # 128k tokens of an 8B model's layers, a GPU
    python benchmarks/offload.py --tokens 2k --layers 2 --batches 1,2 --steps 4 \\
        --device cpu --backend reference            # the same on a CPU: compared, not timed

The layers have the shape of an 8B model's (32/8 heads of 128, bfloat16) and nothing runs between
them: what is timed is attention with its writes, search and loads. `--weights-ms` is added to both
sides for the rest of a step. Keys are about planted topics, and queries drift: each is the one of
the step before mixed with a new one, and now and then it jumps to another topic (`--drift`,
`--jump`). Outputs are compared bit for bit in every step; steps are replayed as CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hipserve.attention.dense import attend_chosen
from hipserve.cache.host import PinnedMemory
from hipserve.cache.staging import StagedPages
from hipserve.cache.store import PageStore, ResidentPages, Write
from hipserve.cache.tiles import TiledPages, row_tiles
from hipserve.cli.numbers import parse_count
from hipserve.config import HiPConfig
from hipserve.offload import slot_bytes
from hipserve.ops import refresh_blocks, select_blocks
from hipserve.plan import BatchLayout, pruning_rule
from hipserve.types import BlockSelection, KeyPool

KV_HEADS, GROUP, DIM, PAGE = 8, 4, 128, 256
TOPICS = 64
CHUNK = 16384


@dataclass
class Batch:
    """Sequences of equal length, as kernels see them; a step moves them on, in place."""

    length: int
    count: int
    device: torch.device

    def __post_init__(self) -> None:
        self.per_seq = -(-(self.length + 4096) // PAGE)
        ids = torch.arange(self.count * self.per_seq).view(self.count, -1)
        self.tables: list[list[int]] = ids.tolist()
        self.table = ids.int().to(self.device)
        self.at = self.length
        starts = self.table.long()[:, self.length // PAGE]
        self.slots = starts * PAGE + self.length % PAGE
        self.layout = BatchLayout.of(self.table, [self.length + 1] * self.count, [1] * self.count)

    def writes(self, begin: int, end: int) -> list[Write]:
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


def drifting(of: Tensor, count: int, steps: int, drift: float, jump: float) -> Tensor:
    """`[steps, count, KV_HEADS * GROUP, DIM]`: queries that are like those of the step before."""
    g = torch.Generator(of.device).manual_seed(2)
    queries: list[Tensor] = []

    def fresh() -> Tensor:
        about = torch.randint(TOPICS, (count,), generator=g, device=of.device)
        shape = (count, KV_HEADS, GROUP, DIM)
        noise = torch.randn(shape, generator=g, device=of.device)
        return 0.6 * of[about][:, :, None] + noise

    q = fresh()
    for _ in range(steps):
        new = fresh()
        jumps = torch.rand(count, 1, 1, 1, generator=g, device=of.device) < jump
        mixed = math.sqrt(1 - drift**2) * q + drift * new
        q = torch.where(jumps, new, mixed)
        queries.append(q.flatten(1, 2))
    return torch.stack(queries)


class Layers:
    """The layers of a model on one kind of memory."""

    def __init__(
        self, stores: list[PageStore], batch: Batch, config: HiPConfig, backend: str
    ) -> None:
        self.stores, self.batch, self.config, self.backend = stores, batch, config, backend
        self.rule = pruning_rule(config, "cuda")
        kept = torch.full((batch.count, KV_HEADS, config.max_selected), -1).int()
        self.kept = [
            BlockSelection(kept.to(batch.device).clone(), torch.zeros_like(batch.table[:, 0]))
            for _ in stores
        ]
        self.due = torch.ones(batch.count, dtype=torch.int32, device=batch.device)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A decode step of all layers; q `[count, heads, DIM]`, k and v `[layers, count, ...]`.

        Every layer's queries are those of the one before, shifted by its output.
        """
        batch, out = self.batch, q
        for i, store in enumerate(self.stores):
            store.write(k[i], v[i], batch.slots, batch.writes(batch.at, batch.at + 1))
            if self.config.refresh_interval == 1:
                selection = self._select(out, store, batch.layout)
            else:
                selection = self.kept[i]
                refresh_blocks(
                    out,
                    store.index,
                    batch.layout,
                    selection,
                    self.due,
                    config=self.config,
                    rule=self.rule,
                    backend=self.backend,
                )
            pool = store.fetch(selection, batch.layout, self.config, self.rule)
            out = q + 0.1 * self._attend(out, pool, batch.layout, selection)
        return out

    def _select(self, q: Tensor, store: PageStore, layout: BatchLayout) -> BlockSelection:
        options: dict[str, Any] = {"config": self.config, "rule": self.rule}
        return select_blocks(q, store.index, layout, check=False, backend=self.backend, **options)

    def _attend(
        self, q: Tensor, pool: KeyPool, layout: BatchLayout, selection: BlockSelection | None
    ) -> Tensor:
        options: dict[str, Any] = {"config": self.config, "backend": self.backend}
        return attend_chosen(q, pool, layout, selection, **options)[0]

    def read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The prompt in chunks through every layer; the last chunk's output.

        q `[CHUNK, heads, DIM]`, k and v `[layers, tokens, ...]`.
        """
        tokens, out, batch = k.shape[1], q, self.batch
        for begin in range(0, tokens, CHUNK):
            end = min(begin + CHUNK, tokens)
            rows = q[: end - begin]
            slots = torch.arange(begin, end, device=q.device)  # of the first sequence's pages
            layout = BatchLayout.of(batch.table[:1], [end], [end - begin])
            for i, store in enumerate(self.stores):
                writes = [Write(batch.tables[0], begin, end)]
                store.write(k[i, begin:end], v[i, begin:end], slots, writes)
                selection = None
                if layout.may_prune(self.rule):
                    selection = self._select(rows, store, layout)
                pool = store.fetch(selection, layout, self.config, self.rule)
                out = self._attend(rows, pool, layout, selection)
        return out


def captured(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """A replay of the call as a CUDA graph, and the tensor that holds what it returns."""
    if device.type != "cuda":
        kept = call()

        def again() -> None:
            kept.copy_(call())

        return again, kept
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    return graph.replay, held


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Bench:
    """Resident and offloaded layers with the same keys."""

    def __init__(self, options: argparse.Namespace, count: int, interval: int) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.batch = Batch(options.tokens, count, self.device)
        self.config = HiPConfig(
            code_bits=4, rerank=8, refresh_interval=interval, decode_dense_below=0, dense_below=8192
        )
        g = torch.Generator(self.device).manual_seed(1)
        self.of = topics(g, self.device)
        shape, like = (options.layers, count), torch.empty(KV_HEADS, DIM, dtype=self.dtype)
        like = like.to(self.device)
        self.q = torch.zeros(count, KV_HEADS * GROUP, DIM, dtype=self.dtype, device=self.device)
        self.k, self.v = (
            torch.randn(*shape, KV_HEADS, DIM, generator=g, device=self.device).to(self.dtype)
            for _ in range(2)
        )
        resident: list[PageStore] = [
            ResidentPages(PAGE, self.config.index_form, like) for _ in range(options.layers)
        ]
        staged, pages = StagedPages(PAGE, like), count * self.batch.per_seq
        page = 2 * KV_HEADS * PAGE * DIM * like.element_size()
        slot = slot_bytes(KV_HEADS, DIM, like.element_size())
        arena = int(options.arena * count * options.tokens / PAGE * page) // slot
        self.slots = max(arena, count * row_tiles(self.config))
        offloaded: list[PageStore] = [
            TiledPages(
                PAGE,
                self.config.index_form,
                like,
                memory=PinnedMemory(pages * page, pinned=like.is_cuda),
                device_bytes=self.slots * slot,
                staged=staged,
                floor=row_tiles(self.config),
                backend=options.backend,
            )
            for _ in range(options.layers)
        ]
        began = time.perf_counter()
        for store in (*resident, *offloaded):
            store.grow(0, pages, like)
        self.pinning = time.perf_counter() - began
        self.sides = [
            Layers(stores, self.batch, self.config, options.backend)
            for stores in (resident, offloaded)
        ]

    def fill(self) -> dict[str, Any]:
        """Reads all sequences, timed for the first one; the outputs of both sides are equal."""
        g = torch.Generator(self.device).manual_seed(3)
        tokens, layers = self.options.tokens, self.options.layers
        q = keys_of(self.of, min(CHUNK, tokens), g).to(self.dtype)
        q = q.repeat_interleave(GROUP, dim=1)
        k = keys_of(self.of, tokens, g).to(self.dtype).expand(layers, -1, -1, -1)
        v = torch.randn(k.shape[1:], generator=g, device=self.device).to(self.dtype).expand_as(k)
        seconds: list[float] = []
        outs: list[Tensor] = []
        for side in self.sides:
            for _ in range(2):  # the first compiles
                began = synchronized(self.device)
                outs.append(side.read(q, k, v).clone())
                took = synchronized(self.device) - began
            seconds.append(took)
        assert torch.equal(outs[0], outs[-1]), "prefill differs"
        self._copy_sequences()
        return {"prefill_s": seconds, "prefill_ratio": seconds[1] / seconds[0]}

    def _copy_sequences(self) -> None:
        """All sequences get the pages of the first: what they hold does not change the speed."""
        first, per_seq = self.sides[0].stores, self.batch.per_seq
        for resident, offloaded in zip(first, self.sides[1].stores, strict=True):
            assert isinstance(offloaded, TiledPages)
            host = offloaded.pool
            tensors = [resident.pool.k_cache, resident.pool.v_cache, host.k_cache, host.v_cache]
            for x in (*tensors, *resident.index.tensors(), *offloaded.index.tensors()):
                for seq in range(1, self.batch.count):
                    x[seq * per_seq : (seq + 1) * per_seq] = x[:per_seq]

    def decode(self) -> dict[str, Any]:
        """Steps of both sides in turn, whose outputs are equal, and what they take."""
        options, batch = self.options, self.batch
        queries = drifting(self.of, batch.count, options.steps, options.drift, options.jump)
        replays: list[Callable[[], None]] = []
        held: list[Tensor] = []
        for side in self.sides:
            for _ in range(2):
                side.step(self.q, self.k, self.v)
            synchronized(self.device)
            replay, out = captured(lambda s=side: s.step(self.q, self.k, self.v), self.device)
            replays.append(replay)
            held.append(out)
        times: list[list[float]] = [[], []]
        before = self.loads()
        for i, q in enumerate(queries):
            self.q.copy_(q)
            for side in self.sides:
                side.due.fill_(int(i % self.config.refresh_interval == 0))
            for side, replay in enumerate(replays):
                began = synchronized(self.device)
                replay()
                times[side].append(synchronized(self.device) - began)
            assert torch.equal(*held), f"step {i} differs"
            if i == options.steps // 4:
                before = self.loads()  # the first steps find an empty arena
        needed, loaded = (b - a for a, b in zip(before, self.loads(), strict=True))
        warm = [statistics.fmean(t[options.steps // 4 + 1 :]) * 1e3 for t in times]
        counted = options.steps - options.steps // 4 - 1
        tile = 2 * 16 * DIM * self.k.element_size()
        weights = options.weights_ms
        return {
            "step_ms": warm,
            "speed": warm[0] / warm[1],
            "speed_with_weights": (warm[0] + weights) / (warm[1] + weights),
            "hit_ratio": 1 - loaded / max(needed, 1),
            "loaded_bytes_a_step": loaded * tile / counted,
            "p99_ms": [sorted(t)[int(len(t) * 0.99)] * 1e3 for t in times],
        }

    def loads(self) -> tuple[int, int]:
        counts = [store.count_loads() for store in self.sides[1].stores]
        return sum(n for n, _ in counts), sum(m for _, m in counts)

    def link(self) -> float:
        """Bytes a second of a step whose tiles are all missing, attention and search included."""
        side = self.sides[1]
        times: list[float] = []
        for _ in range(3):
            for store in side.stores:
                store.arena.where.fill_(-1)  # type: ignore[attr-defined]
            before, began = self.loads(), synchronized(self.device)
            side.step(self.q, self.k, self.v)
            times.append(synchronized(self.device) - began)
            loaded = self.loads()[1] - before[1]
        return loaded * 2 * 16 * DIM * self.k.element_size() / min(times)

    def nbytes(self) -> dict[str, int]:
        stores = self.sides[1].stores
        return {
            "host": sum(store.host_nbytes for store in stores),
            "device": sum(store.device_nbytes for store in stores),
            "resident": sum(store.device_nbytes for store in self.sides[0].stores),
        }


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--tokens", type=parse_count, default=131072)
    parse.add_argument("--layers", type=int, default=32)
    parse.add_argument("--batches", type=lambda x: [int(n) for n in x.split(",")], default=[1, 8])
    parse.add_argument("--intervals", type=lambda x: [int(n) for n in x.split(",")], default=[1, 8])
    parse.add_argument("--steps", type=int, default=256)
    parse.add_argument("--arena", type=float, default=0.2, help="share of the keys and values")
    parse.add_argument("--drift", type=float, default=0.3)
    parse.add_argument("--jump", type=float, default=0.02)
    parse.add_argument("--weights-ms", type=float, default=0.0)
    parse.add_argument("--device", default="cuda")
    parse.add_argument("--backend", default="auto")
    options = parse.parse_args()
    for count in options.batches:
        for interval in options.intervals:
            bench = Bench(options, count, interval)
            result = {"batch": count, "refresh_interval": interval, "slots": bench.slots}
            result |= {"pinning_s": bench.pinning, **bench.fill(), **bench.decode()}
            result |= {"missing_bytes_a_second": bench.link(), **bench.nbytes()}
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
            del bench


if __name__ == "__main__":
    main()
