"""HiP attention on one GPU compared with the fastest dense attention there: one command, one CSV.

    python benchmarks/gpu.py check --count 1000 --processes 16   # kernels against the definition
    python benchmarks/gpu.py tune             # tiles of the search, timed
    python benchmarks/gpu.py compile --first 0   # one row's kernels into Triton's cache
    python benchmarks/gpu.py speed --csv docs/data/attention-h200.csv
    python benchmarks/gpu.py speed --kv-dtype fp8   # every row with pages in fp8 as well

`speed` runs `check` first and times nothing if it fails. One layer, 32/8 heads, head_dim 128,
bfloat16, the default configuration; selection is part of every HiP number. Dense is the fastest of
torch's SDPA backends, in turn with HiP. Decode replays a CUDA graph over several layers with caches
of their own, so that no step finds its keys in the L2 cache.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_check import check
from gpu_inputs import DIM, HEADS, KV_HEADS, PAGE, contiguous, decode_inputs, inputs, paged, say
from hipserve import HiPConfig, hip_attention
from hipserve.ops import (
    block_sparse_attention,
    build_index,
    refresh_blocks,
    select_blocks,
)
from hipserve.ops.select_blocks.triton import tiling as selection
from hipserve.plan import BatchLayout, pruning_rule
from hipserve.testing.cases import make_rope
from hipserve.types import BlockSelection, KeyIndex, KeyPool
from options import launch, need_gpu

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PAGE_DTYPES = {
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
Rows = list[dict[str, Any]]


def milliseconds(call: Callable[[], object], runs: int = 5, in_a_row: int = 4) -> float:
    """Median of `runs` times of one call, as a model makes them: some in a row, one a layer."""
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        for _ in range(in_a_row):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / in_a_row)
    return statistics.median(times)


def dense_call(q: Tensor, k: Tensor, v: Tensor, name: str) -> Callable[[], Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = q.shape[2] == k.shape[2]

    def call() -> Tensor:
        with sdpa_kernel(DENSE[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return call


def fastest(
    calls: dict[str, Callable[[], object]], runs: int, in_a_row: int = 4
) -> tuple[str, float]:
    """Name and milliseconds of the fastest dense backend that takes this call."""
    times: dict[str, float] = {}
    for name, call in calls.items():
        try:
            times[name] = milliseconds(call, runs, in_a_row)
        except RuntimeError as error:
            say(f"dense {name} cannot: {str(error)[:100]}")
    return min(times.items(), key=lambda item: item[1], default=("none", float("nan")))


def prefill(
    length: int, config: HiPConfig, page_dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Milliseconds of a layer; `hip` is the sum of parts with pages in fp8 and beyond the trained
    length."""
    q, k, v = inputs(length)
    runs = 3 if length > 65536 else 5
    layers = min(max(2**18 // length, 4), 32)
    name, dense = fastest({name: dense_call(q, k, v, name) for name in DENSE}, runs, layers)
    pool, index, layout = paged(k, v, length, config, page_dtype)
    rows = q[0]
    options: dict[str, Any] = {"config": config, "rope": rope_of(config), "check": False}
    chosen = select_blocks(rows, index, layout, **options)
    parts = {
        "index": lambda: build_index(pool.k_cache, **config.index_form._asdict()),
        "select": lambda: select_blocks(rows, index, layout, **options),
        "attend": lambda: block_sparse_attention(rows, pool, layout, chosen, **options),
    }
    if page_dtype == torch.bfloat16 and not config.streams:
        parts["hip"] = lambda: hip_attention(q, k, v, config=config)
    times = {part: milliseconds(call, runs, layers) for part, call in parts.items()}
    times.setdefault("hip", sum(times.values()))
    listed = (chosen.indices >= 0).sum().item() * config.key_block_size / KV_HEADS
    position = torch.arange(0, length, 64, device="cuda")
    window = (position + 64 - chosen.window_start).sum().item()
    flops = 4 * 64 * HEADS * DIM * (listed + window + config.num_sink_tokens * len(position))
    return {
        "what": "prefill",
        "pages": name_of(page_dtype),
        "length": length,
        "batch": 1,
        "dense": name,
        "dense_ms": dense,
        **{f"{part}_ms": value for part, value in times.items()},
        "ratio": dense / times["hip"],
        "attend_tflops": flops / times["attend"] / 1e9,
    }


def rope_of(config: HiPConfig) -> Tensor | None:
    """How keys are turned, of a config that streams (`docs/extend.md`)."""
    return make_rope(DIM).cuda() if config.streams else None


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def decode(
    length: int,
    batch: int,
    config: HiPConfig,
    layers: int,
    room: int = 0,
    page_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Microseconds of one layer's step; one graph serves refresh and reuse, a flag decides.

    The block table of an engine's graph has room for the longest sequence that it serves: `room`
    keys, or these only if 0. Where nothing in it can be pruned, nothing is searched.
    """
    made = [decode_inputs(length, batch, config, seed, page_dtype) for seed in range(layers)]
    q, pools, indexes, layouts = zip(*made, strict=True)
    layout = layouts[0]
    columns = layout.block_table.shape[1]
    if room:
        wide = F.pad(layout.block_table, (0, room // PAGE - columns))
        layout = BatchLayout(wide, layout.seq_lens, layout.cu_seqlens_q)
    prunes = pruning_rule(config, "cuda").prunes(layout.block_table.shape[1] * PAGE - 1, 1)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    layout.window_starts(pruning_rule(config, "cuda"))  # kept: a graph cannot wait for the host
    refresh = torch.ones(batch, **ints)
    shared: dict[str, Any] = {"config": config, "rope": rope_of(config)}
    chosen = [
        BlockSelection(
            torch.full((batch, KV_HEADS, config.max_selected), -1, **ints),
            torch.zeros(batch, **ints),
        )
        for _ in range(layers)
    ]
    outs: list[Tensor] = []

    def step() -> None:
        outs.clear()
        for i, (pool, index) in enumerate(zip(pools, indexes, strict=True)):
            if prunes:
                refresh_blocks(q[i], index, layout, chosen[i], refresh, **shared)
            selection = chosen[i] if prunes else None
            options = {**shared, "check": False}
            outs.append(block_sparse_attention(q[i], pool, layout, selection, **options)[0])

    graph = capture(step)
    graph.replay()
    first = [out.clone() for out in outs]
    fresh = milliseconds(graph.replay, 20)
    refresh.zero_()
    reused = milliseconds(graph.replay, 20)
    assert all(torch.equal(a, b) for a, b in zip(first, outs, strict=True)), "replays differ"
    if prunes:
        eager = select_blocks(q[0], indexes[0], layout, **shared, check=False)
        assert torch.equal(eager.indices, chosen[0].indices), "graph and eager selections differ"

    table = layout.block_table[:, :columns]
    whole = [[contiguous(x, table) for x in (pool.k_cache, pool.v_cache)] for pool in pools]

    def dense(name: str) -> Callable[[], None]:
        def all_layers() -> None:
            for i, (k, v) in enumerate(whole):
                dense_call(q[i][:, None], k, v, name)()

        return all_layers

    held: dict[str, torch.cuda.CUDAGraph] = {}

    def replay(name: str) -> None:
        if name not in held:
            held[name] = capture(dense(name))
        held[name].replay()

    name, slow = fastest({name: functools.partial(replay, name) for name in DENSE}, 5)
    per = 1000 / layers
    hip8 = (fresh + 7 * reused) / 8
    return {
        "what": "decode",
        "pages": name_of(page_dtype),
        "length": length,
        "batch": batch,
        "room": layout.block_table.shape[1] * PAGE,
        "dense": name,
        "dense_us": slow * per,
        "refresh1_us": fresh * per,
        "reuse_us": reused * per,
        "refresh8_us": hip8 * per,
        "ratio": slow / hip8,
    }


def tune(length: int) -> None:
    """Times tiles of the search (`tile_keys`), of prefill and of decode, and attention as it is."""
    config = HiPConfig()
    q, k, v = inputs(length)
    pool, index, layout = paged(k, v, length, config)
    timed = functools.partial(milliseconds, runs=4)
    tune_one("prefill", timed, (q[0], pool, index, layout), TILES)
    del q, k, v, pool, index
    for batch in (1, 8):
        made = decode_inputs(131072, batch, config)
        name = f"decode, batch {batch}"
        tune_one(name, lambda call: milliseconds(capture(call).replay, 20), made, LONE_TILES)


def tune_one(
    what: str,
    timed: Callable[[Callable[[], object]], float],
    made: tuple[Tensor, KeyPool, KeyIndex, BatchLayout],
    tiles: list[tuple[int, int, int, int]],
) -> None:
    config = HiPConfig()
    q, pool, index, layout = made
    chosen = select_blocks(q, index, layout, config=config, check=False)
    attend = lambda: block_sparse_attention(q, pool, layout, chosen, config=config, check=False)  # noqa: E731
    search = lambda: select_blocks(q, index, layout, config=config, check=False)  # noqa: E731
    say(f"tune {what}: attend {1000 * timed(attend):.1f} us, select {1000 * timed(search):.1f} us")
    usual = selection.tile_keys
    for tile in tiles:
        selection.tile_keys = lambda *_, t=tile: selection.TileSizes(*t)
        selection.plan.cache_clear()
        try:
            say(f"tune {what}: select, {tile}: {1000 * timed(search):.1f} us")
        except Exception as error:  # what does not fit is no option
            say(f"tune {what}: {tile}: {type(error).__name__} {str(error)[:80]}")
        finally:
            selection.tile_keys = usual
            selection.plan.cache_clear()


TILES = [(128, 64, 32, 2), (128, 64, 64, 1), (128, 32, 32, 2), (64, 64, 32, 2), (128, 128, 64, 2)]
LONE_TILES = [(128, 64, 128, 1), (128, 32, 128, 1), (64, 64, 64, 1), (256, 64, 128, 1)]


def jobs(
    config: HiPConfig, layers: int = 8, page_dtype: torch.dtype = torch.bfloat16
) -> list[functools.partial[dict[str, Any]]]:
    """The table of `speed`, the most wanted rows first: each with pages in bfloat16, and with those
    of another type behind it."""
    few = min(layers, 4)
    rows = [
        functools.partial(prefill, 131072, config),
        functools.partial(decode, 131072, 1, config, layers),
        functools.partial(decode, 131072, 8, config, few),
        functools.partial(prefill, 32768, config),
        functools.partial(prefill, 8192, config),
        functools.partial(prefill, 65536, config),
        functools.partial(decode, 2**20, 1, config, few),
        functools.partial(prefill, 16384, config),
        functools.partial(prefill, 4096, config),
        functools.partial(decode, 32768, 1, config, layers),
        functools.partial(decode, 8192, 1, config, layers),
        functools.partial(decode, 8192, 1, config, layers, room=131072),
        functools.partial(decode, 24576, 1, config, layers),
        functools.partial(decode, 8192, 8, config, few),
        functools.partial(decode, 32768, 8, config, few),
    ]
    if page_dtype == torch.bfloat16:
        return rows
    return [job for row in rows for job in (row, functools.partial(row, page_dtype=page_dtype))]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def speed(
    path: str | None, deadline: float, config: HiPConfig, only: str, page_dtype: torch.dtype
) -> None:
    rows: Rows = []
    for job in jobs(config, page_dtype=page_dtype):
        if only not in ("", job.func.__name__):
            continue
        if time.time() > deadline:
            say("out of time; the rest is unmeasured")
            break
        try:
            rows.append(job())
            say(" ".join(f"{name}={_short(value)}" for name, value in rows[-1].items()))
        except Exception as error:  # the other rows still count
            say(f"{type(error).__name__}: {str(error)[:400]}")
        torch.cuda.empty_cache()
        if path and rows:
            write(path, rows, config)


def write(path: str, rows: Rows, config: HiPConfig) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        import triton

        device = torch.cuda.get_device_name(0)
        file.write(
            f"# {device}, torch {torch.__version__}, triton {triton.__version__}, bfloat16, "
        )
        file.write(f"{HEADS}/{KV_HEADS} heads, head_dim {DIM}, {time.strftime('%Y-%m-%d')}\n")
        file.write(f"# {config}\n")
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["check", "tune", "speed", "compile"])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--csv")
    parser.add_argument("--only", choices=["", "prefill", "decode"], default="", help="of speed")
    parser.add_argument(
        "--config", type=json.loads, default="{}", help="changes of the default, as JSON"
    )
    parser.add_argument("--kv-dtype", choices=PAGE_DTYPES, default="bfloat16", help="of pages")
    options = parser.parse_args()
    need_gpu()
    began, pages = time.time(), PAGE_DTYPES[options.kv_dtype]
    say(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    if options.what == "tune":
        tune(options.length)
    elif options.what == "compile":
        DENSE.clear()
        jobs(HiPConfig(), layers=1, page_dtype=pages)[options.first]()
    else:
        seeds = range(options.first, options.first + options.count)
        fp8 = options.kv_dtype != "bfloat16"
        if not check(seeds, options.processes, options.seconds, fp8=fp8):
            sys.exit(1)
        if options.what == "speed":
            config = HiPConfig().replace(**options.config)
            speed(options.csv, began + options.seconds, config, options.only, pages)
    say(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    launch(main)
