"""Decoding and reading with keys and values in host memory, compared with the same on the GPU.

    python benchmarks/offload.py                    # 128k tokens of an 8B model, on a GPU
    python benchmarks/offload.py --tokens 2k --layers 2 --batches 1,2 --steps 4 --no-matrices \\
        --device cpu --backend reference            # the same on a CPU: compared, not timed

The layers have the shape of an 8B model's (32/8 heads of 128, bfloat16), and between them are its
matrix products with random weights. Queries are those of texts, whose words recur. Outputs are
compared bit for bit in every step; steps are replayed as CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hipserve.cache.host import PinnedMemory
from hipserve.cache.staging import Staging
from hipserve.cache.store import PageStore, ResidentPages
from hipserve.cache.tiles import TiledPages, row_tiles
from hipserve.cli.numbers import parse_count
from hipserve.config import HiPConfig
from hipserve.offload import slot_bytes
from offload_layers import (
    DIM,
    GROUP,
    KV_HEADS,
    PAGE,
    Batch,
    Layers,
    Matrices,
    keys_of,
    recurring,
    topics,
)
from options import launch, need_gpu

TILE_BYTES = 2 * 16 * DIM


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

    def __init__(self, options: argparse.Namespace, count: int, matrices: Matrices | None) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.batch = Batch(options.tokens, count, self.device)
        self.config = HiPConfig(code_bits=4, rerank=8, decode_dense_below=0, dense_below=8192)
        g = torch.Generator(self.device).manual_seed(1)
        self.of = topics(g, self.device)
        shape = (options.layers, count, KV_HEADS, DIM)
        self.q = torch.zeros(count, KV_HEADS * GROUP, DIM, dtype=self.dtype, device=self.device)
        self.k, self.v = (
            torch.randn(shape, generator=g, device=self.device).to(self.dtype) for _ in range(2)
        )
        makes = {"resident": self._resident, "offloaded": self._offloaded}
        self.slots = 0
        self.sides = {name: self._layers(makes[name](), matrices) for name in options.sides}

    def _layers(self, stores: list[PageStore], matrices: Matrices | None) -> Layers:
        began = time.perf_counter()
        for store in stores:
            store.grow(0, self.batch.count * self.batch.per_seq, self.k[0])
        self.growing = time.perf_counter() - began
        return Layers(stores, self.batch, self.options.backend, matrices)

    def _resident(self) -> list[PageStore]:
        form, layers = self.config.index_form, self.options.layers
        return [ResidentPages(PAGE, form, self.k[0]) for _ in range(layers)]

    def _offloaded(self) -> list[PageStore]:
        options, batch = self.options, self.batch
        itemsize, floor = self.k.element_size(), row_tiles(self.config.replace(refresh_interval=8))
        wanted = int(options.arena * batch.count * batch.length / 16)
        self.slots = max(wanted, batch.count * floor)
        staging = Staging(PAGE, self.k[0])
        nbytes = batch.count * batch.per_seq * PAGE // 16 * KV_HEADS * TILE_BYTES * itemsize
        return [
            TiledPages(
                PAGE,
                self.config.index_form,
                self.k[0],
                memory=PinnedMemory(nbytes, pinned=self.k.is_cuda),
                device_bytes=self.slots * slot_bytes(KV_HEADS, DIM, itemsize),
                staging=staging,
                floor=floor,
                backend=options.backend,
            )
            for _ in range(options.layers)
        ]

    def fill(self) -> dict[str, Any]:
        """Reads the text, timed, then a question; the outputs of both sides are equal."""
        g = torch.Generator(self.device).manual_seed(3)
        tokens, chunk, layers = self.options.tokens, self.options.chunk, self.options.layers
        q = keys_of(self.of, min(chunk, tokens), g).to(self.dtype).repeat_interleave(GROUP, dim=1)
        more = tokens + self.options.question
        k = keys_of(self.of, more, g).to(self.dtype).expand(layers, -1, -1, -1)
        v = torch.randn(k.shape[1:], generator=g, device=self.device).to(self.dtype).expand_as(k)

        def read(side: Layers, begin: int, end: int) -> Tensor:
            for start in range(begin, end, chunk):
                stop = min(start + chunk, end)
                out = side.read(q[: stop - start], k[:, start:stop], v[:, start:stop], start, stop)
            return out

        result: dict[str, Any] = {"batch": self.batch.count, "growing_s": self.growing}
        outs: list[list[Tensor]] = []
        for side in self.sides.values():
            side.configure(self.config)
            read(side, 0, min(2 * chunk, tokens))
            read(side, tokens, more)
        # all is compiled
        for name, side in self.sides.items():
            times = [synchronized(self.device)]
            text = read(side, 0, tokens).clone()
            times.append(synchronized(self.device))
            question = read(side, tokens, more).clone()
            times.append(synchronized(self.device))
            outs.append([text, question])
            result[name] = {"reading_s": times[1] - times[0], "question_s": times[2] - times[1]}
        for first, second in zip(outs[0], outs[-1], strict=True):
            assert torch.equal(first, second), "reading differs"
        self._copy_sequences()
        return result

    def _copy_sequences(self) -> None:
        """All sequences get the pages of the first: what they hold does not change the speed."""
        per_seq = self.batch.per_seq
        for side in self.sides.values():
            for store in side.stores:
                for x in (store.pool.k_cache, store.pool.v_cache, *store.index.tensors()):
                    for seq in range(1, self.batch.count):
                        x[seq * per_seq : (seq + 1) * per_seq] = x[:per_seq]

    def decode(self, interval: int) -> dict[str, Any]:
        """Steps of both sides in turn, whose outputs are equal, and what they take."""
        options, batch = self.options, self.batch
        queries = recurring(self.of, batch.count, options.steps)
        replays: list[Callable[[], None]] = []
        held: list[Tensor] = []
        sides = [*self.sides.values()]
        for side in sides:
            side.configure(self.config.replace(refresh_interval=interval))
            for _ in range(2):
                side.step(self.q, self.k, self.v)
            synchronized(self.device)
            replay, out = captured(lambda s=side: s.step(self.q, self.k, self.v), self.device)
            replays.append(replay)
            held.append(out)
        times: list[list[float]] = [[] for _ in sides]
        skipped = options.steps // 4  # they find an empty arena
        before = self.loads()
        for i, q in enumerate(queries):
            self.q.copy_(q)
            if i == skipped:
                before = self.loads()
            for side, replay, took in zip(sides, replays, times, strict=True):
                side.due.fill_(int(i % interval == 0))
                began = synchronized(self.device)
                replay()
                took.append(synchronized(self.device) - began)
            assert torch.equal(held[0], held[-1]), f"step {i} differs"
        needed, loaded = (b - a for a, b in zip(before, self.loads(), strict=True))
        tile = TILE_BYTES * self.k.element_size()
        result: dict[str, Any] = {"batch": batch.count, "refresh_interval": interval}
        for name, replay, took in zip(self.sides, replays, times, strict=True):
            step = statistics.fmean(took[skipped:])
            p99 = sorted(took[skipped:])[int((options.steps - skipped) * 0.99)]
            result[name] = {
                "step_ms": step * 1e3,
                "p99_ms": p99 * 1e3,
                "tokens_a_s": batch.count / step,
            }
            if self.device.type == "cuda":
                result[name]["kernels_us"] = kernels(replay)
        if "offloaded" in self.sides:
            result["hit_ratio"] = 1 - loaded / max(needed, 1)
            result["loaded_bytes_a_step"] = loaded * tile / (options.steps - skipped)
            if self.device.type == "cuda":
                result["link_bytes_a_second"] = self.link(replays[-1])
        if len(sides) == 2:
            result["speed"] = result["resident"]["step_ms"] / result["offloaded"]["step_ms"]
        return result

    def loads(self) -> tuple[int, int]:
        """Tiles needed and loaded so far."""
        sides = self.sides.values()
        counts = [store.count_loads() for side in sides for store in side.stores]
        return sum(n for n, _ in counts), sum(m for _, m in counts)

    def link(self, replay: Callable[[], None]) -> float:
        """Bytes a second while tiles are loaded, in a step whose tiles are all missing."""
        for store in self.sides["offloaded"].stores:
            store.arena.where.fill_(-1)  # type: ignore[attr-defined]
        before = self.loads()[1]
        took = kernels(replay, 1)["load_kernel"]
        tiles = (self.loads()[1] - before) / self.options.layers
        return tiles * TILE_BYTES * self.k.element_size() / (took * 1e-6)

    def nbytes(self) -> dict[str, Any]:
        """Of keys, values and their index, and what the card holds at most."""
        found: dict[str, Any] = {"slots": self.slots}
        for name, side in self.sides.items():
            host = sum(store.host_nbytes for store in side.stores)
            found[f"{name}_bytes"] = [sum(store.device_nbytes for store in side.stores), host]
        if self.device.type == "cuda":
            found["card_bytes"] = torch.cuda.max_memory_allocated()
        return found


def kernels(replay: Callable[[], None], times: int = 4) -> dict[str, float]:
    """Mean microseconds of every kernel that is no matrix product, and how often it runs."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(times):
            replay()
        torch.cuda.synchronize()
    means: dict[str, float] = {}
    for event in found.key_averages():
        if (
            "gemm" not in event.key
            and "nvjet" not in event.key
            and event.count >= times
            and event.device_time_total
        ):
            name = event.key.split("<")[0][-40:]
            means[name] = round(event.device_time_total / event.count, 2)
    return means


def main() -> None:
    def counts(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--tokens", type=parse_count, default=131072)
    parse.add_argument(
        "--chunk", type=parse_count, default=16384, help="rows that are read at a time"
    )
    parse.add_argument("--question", type=int, default=64, help="rows of a question")
    parse.add_argument("--layers", type=int, default=32)
    parse.add_argument("--batches", type=counts, default=[1, 8])
    parse.add_argument("--intervals", type=counts, default=[1, 8])
    parse.add_argument("--steps", type=int, default=256)
    parse.add_argument("--arena", type=float, default=0.2, help="share of the keys and values")
    parse.add_argument("--sides", type=lambda x: x.split(","), default=["resident", "offloaded"])
    parse.add_argument("--card-memory", type=parse_count, help="bytes of the card that may be used")
    parse.add_argument("--no-matrices", action="store_true", help="attention alone")
    parse.add_argument("--device", default="cuda")
    parse.add_argument("--backend", default="auto")
    options = parse.parse_args()
    need_gpu(options.device)
    if options.card_memory:
        share = options.card_memory / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    like = torch.empty(0, dtype=dtype, device=options.device)
    matrices = None if options.no_matrices else Matrices(options.layers, like)

    def show(result: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()

    with torch.no_grad():
        for count in options.batches:
            bench = Bench(options, count, matrices)
            show({**bench.fill(), **bench.nbytes()})
            for interval in options.intervals:
                show(bench.decode(interval))
            del bench


if __name__ == "__main__":
    launch(main)
