"""Compiles every kernel ahead of time for one GPU and prints what each needs, as JSON.

    python tests/gpu/ahead.py 90

No GPU is needed: a driver that only names the target stands in for it. Registers and spills are
what Triton's own call of ptxas reports, whichever ptxas that version takes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import re
import sys
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hipserve import HiPConfig
from hipserve.config import IndexForm
from hipserve.ops.block_sparse_attention.triton import launch as attention
from hipserve.ops.block_sparse_attention.triton import tiling as attention_tiling
from hipserve.ops.block_sparse_attention.triton import turned as turning
from hipserve.ops.block_sparse_attention.triton.hopper import launch as hopper
from hipserve.ops.load_tiles.reading import Reading
from hipserve.ops.load_tiles.triton import launch as loading
from hipserve.ops.select_blocks.operator import search_inputs
from hipserve.ops.select_blocks.spec import search_spec
from hipserve.ops.select_blocks.triton import barrier
from hipserve.ops.select_blocks.triton import launch as selection
from hipserve.ops.select_blocks.triton import tiling as selection_tiling
from hipserve.ops.write_kv.layout import IndexLayout
from hipserve.ops.write_kv.triton import launch as writing
from hipserve.types import BlockSelection, KeyPool, TileArena

STREAM = HiPConfig(extend="stream", trained_length=8192)
SHARED = {80: 166912, 89: 101376, 90: 232448}


class NamedTarget:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:  # noqa: ARG002
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_device_interface(self) -> Any:
        return torch.cpu


class Recorder:
    """Stands in for a kernel: a launch compiles it and notes what it needs."""

    def __init__(self, name: str, kernel: Any, found: dict[str, dict[str, int]]) -> None:
        self.name, self.kernel, self.found, self.case = name, kernel, found, ""

    def __getitem__(self, grid: Any) -> Any:
        return functools.partial(self.launch, grid)

    def launch(self, grid: Any, *arguments: Any, **options: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as report:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
        step = f"{options['FIRST']}, " if "FIRST" in options else ""
        name = f"{self.name} {step}{self.case}".strip()
        if report.getvalue():  # nothing was compiled where an earlier case has the same kernel
            self.found[name] = needs(report.getvalue(), compiled.metadata.shared)


def needs(report: str, shared_bytes: int) -> dict[str, int]:
    """What a kernel takes, from the log of ptxas."""
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert registers, report
    assert spilled, report
    return {
        "registers": int(registers[1]),
        "spilled_bytes": int(spilled[1]),
        "shared_bytes": shared_bytes,
    }


def attend(
    recorders: dict[str, Recorder],
    case: str,
    query_len: int,
    selected: bool,
    head_dim: int,
    batch: int = 1,
    tiled: bool = False,
    streams: bool = False,
    page_dtype: torch.dtype = torch.bfloat16,
) -> None:
    for name in ("attention", "merge", "hopper", "turn"):
        recorders[f"{name}_kernel"].case = case
    q = torch.empty(batch * query_len, 32, head_dim, dtype=torch.bfloat16)
    pages = torch.empty(64, 16 if tiled else 256, 8, head_dim, dtype=page_dtype)
    blocks = batch * -(-query_len // 64)
    attention.block_sparse_attention(
        q,
        pages,
        pages,
        torch.zeros(batch, 64, dtype=torch.int32),
        torch.zeros(blocks, 4, dtype=torch.int32),
        torch.zeros(blocks, 8, 64, dtype=torch.int32) if selected else None,
        torch.zeros(blocks, dtype=torch.int32) if selected else None,
        num_sink_tokens=64,
        key_block_size=16,
        sliding_window=0,
        sm_scale=0.1,
        v_scale=1.0,
        softcap=0.0,
        query_block_size=64,
        lists=torch.zeros(blocks, 8, 104, dtype=torch.int32) if tiled else None,
        page_size=256,
        rope=torch.zeros(2, head_dim, dtype=torch.int32) if streams else None,
        trained_length=8192,
    )


def select(
    recorders: dict[str, Recorder],
    case: str,
    query_len: int,
    config: HiPConfig,
    head_dim: int = 128,
    page_dtype: torch.dtype = torch.bfloat16,
) -> None:
    for name in ("baseline", "search"):
        recorders[f"{name}_kernel"].case = case
    q = torch.empty(query_len, 32, head_dim, dtype=torch.bfloat16)
    pages = torch.empty(16, 256, 8, head_dim, dtype=page_dtype)
    index = IndexLayout.of_pages(256, head_dim, page_dtype, config.index_form).empty_like(pages)
    blocks = -(-query_len // 64)
    chosen = torch.zeros(blocks, 8, config.max_selected, dtype=torch.int32)
    inputs = search_inputs(
        q,
        index,
        block_table=torch.zeros(1, 512, dtype=torch.int32),
        query_blocks=torch.zeros(blocks, 4, dtype=torch.int32),
        window_starts=chosen[:, 0, 0].contiguous(),
        config=config,
        rope=torch.zeros(2, head_dim, dtype=torch.int32),
    )
    due = torch.zeros(blocks, dtype=torch.int32) if query_len == 1 else None
    kept = BlockSelection(chosen, chosen[:, 0, 0].contiguous())
    selection.refresh_blocks(inputs, search_spec(config, config.streams), due, kept)


def write(
    recorders: dict[str, Recorder], head_dim: int, page_dtype: torch.dtype = torch.bfloat16
) -> None:
    k = torch.empty(64, 8, head_dim, dtype=torch.bfloat16)
    pages = torch.empty(4, 256, 8, head_dim, dtype=page_dtype)
    slots = torch.zeros(64, dtype=torch.int64)
    for code_bits in (16, 4):
        for recorder in recorders.values():
            recorder.case = f"codes of {code_bits} bits, {page_dtype}"
        index = writing.build_index(pages, 16, code_bits)
        writing.write_kv(k, k, KeyPool(pages, pages), index, slots)
        for apart in (True, False):
            writing.write_whole_runs(k, k, KeyPool(pages, pages), index, slots, apart)


def read_fp8(recorders: dict[str, Recorder], page_dtype: torch.dtype, capability: int) -> None:
    """Pages in fp8: prefill and decode."""
    sizes: dict[str, Any] = {"page_dtype": page_dtype}
    for what, query_len in (("prefill, fp8", 4096), ("decode, fp8", 1)):
        attend(recorders, what, query_len, True, 128, **sizes)
        select(recorders, what, query_len, HiPConfig(), **sizes)
    write(recorders, 128, page_dtype)
    if capability < 90:
        return
    for head_dim in (64, 256):
        attend(recorders, f"prefill, fp8, head_dim {head_dim}", 4096, True, head_dim, **sizes)
        attend(recorders, f"decode, fp8, head_dim {head_dim}", 1, True, head_dim, **sizes)
    attend(recorders, "decode, dense, fp8", 1, False, 128, **sizes)
    attend(recorders, "prefill, stream, fp8", 4096, True, 128, streams=True, **sizes)


def load(
    recorders: dict[str, Recorder], case: str, batch: int, selected: bool, entries: int
) -> None:
    """Decoding with keys and values elsewhere: a tail page is written, and tiles are loaded."""
    k = torch.empty(batch, 8, 128, dtype=torch.bfloat16)
    pages = torch.empty(4, 8, 2, 256, 128, dtype=torch.bfloat16)
    arena = TileArena.empty(1638 * batch, 64, k)
    for recorder in recorders.values():
        recorder.case = case
    lists = torch.zeros(batch, 8, 64, dtype=torch.int32)
    reading = Reading(
        block_table=torch.zeros(batch, 512, dtype=torch.int32),
        query_blocks=torch.zeros(batch, 4, dtype=torch.int32),
        indices=lists if selected else None,
        window_start=torch.zeros(batch, dtype=torch.int32) if selected else None,
        num_sink_tokens=64,
        key_block_size=16,
        max_tiles=entries,
        page_size=256,
        num_kv_heads=8,
    )
    loading.load_tiles(arena, pages, reading)
    slots = torch.zeros(batch, dtype=torch.int64)
    loading.store_rows(k, k, arena, pages, slots)
    tail = torch.empty(batch, 256, 8, 128, dtype=torch.bfloat16)
    index = IndexLayout.of_pages(256, 128, k.dtype, IndexForm(16, 4)).empty_like(tail)
    places = torch.zeros(batch, dtype=torch.int32)
    writing.write_kv(k, k, KeyPool(tail, tail, places), index, slots)


def main() -> None:
    capability = int(sys.argv[1])
    gc.disable()  # a sixth of the time of Triton's front end
    driver.set_active(NamedTarget(capability))
    knobs.nvidia.dump_ptxas_log = True
    attention_tiling.gpu_shared_memory = lambda device: SHARED[capability]
    for module in (attention_tiling, selection_tiling, loading):
        module.chains_launches = lambda device: capability >= 90
    barrier.gpu_processors = lambda device: 132
    found: dict[str, dict[str, int]] = {}
    recorders: dict[str, Recorder] = {}
    attention.specialises_warps = lambda device: False
    hopper.gpu_processors = lambda device: 132
    for module in (attention, turning, hopper, selection, writing, loading):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            recorders[name] = Recorder(name, getattr(module, name), found)
            setattr(module, name, recorders[name])
    attend(recorders, "prefill", 4096, True, 128)
    select(recorders, "prefill", 4096, HiPConfig())
    select(recorders, "several row tiles", 64, HiPConfig(query_stride=1))
    select(recorders, "decode", 1, HiPConfig())
    attend(recorders, "prefill, stream", 4096, True, 128, streams=True)
    select(recorders, "prefill, stream", 4096, STREAM)
    fp8 = torch.float8_e5m2 if capability < 89 else torch.float8_e4m3fn
    read_fp8(recorders, fp8, capability)
    if capability == 89:  # the least shared memory
        attend(recorders, "prefill, head_dim 512", 4096, True, 512)
        attend(recorders, "decode, head_dim 512", 1, True, 512)
        select(recorders, "head_dim 512", 4096, HiPConfig(), head_dim=512)
        select(recorders, "decode, head_dim 512", 1, HiPConfig(), head_dim=512)
        write(recorders, 512)
    if capability == 90:
        attend(recorders, "dense", 4096, False, 128)
        attend(recorders, "decode", 1, True, 128)
        attend(recorders, "decode, dense", 1, False, 128)
        attend(recorders, "decode, tiles", 1, True, 128, tiled=True)
        attend(recorders, "few rows, tiles", 64, True, 128, tiled=True)
        load(recorders, "decode, tiles", 1, True, 103)
        load(recorders, "decode, tiles, batch 8", 8, True, 103)
        load(recorders, "decode, tiles, dense", 1, False, 1536)
        load(recorders, "decode, tiles, graph", 1, True, 1536)
        load(recorders, "decode, tiles, graph, batch 8", 8, True, 1536)
        attend(recorders, "decode, batch 8", 1, True, 128, batch=8)
        attend(recorders, "prefill, head_dim 256", 4096, True, 256)
        select(recorders, "head_dim 256", 4096, HiPConfig(), head_dim=256)
        select(recorders, "decode, head_dim 256", 1, HiPConfig(), head_dim=256)
        select(recorders, "decode, tree", 1, HiPConfig(selector="tree"))
        for bits in (4, 8):
            coded = HiPConfig(code_bits=bits)
            select(recorders, f"prefill, {bits} bits", 4096, coded)
            select(recorders, f"decode, {bits} bits", 1, coded)
        write(recorders, 128)
        attend(recorders, "decode, stream", 1, True, 128, streams=True)
        attend(recorders, "decode, stream, tiles", 1, True, 128, tiled=True, streams=True)
        select(recorders, "decode, stream", 1, STREAM)
        select(recorders, "decode, stream, tree", 1, STREAM.replace(selector="tree"))
        attention.specialises_warps = lambda device: True
        attend(recorders, "prefill", 4096, True, 128)
        attend(recorders, "prefill, dense", 4096, False, 128)
        attend(recorders, "prefill, head_dim 64", 4096, True, 64)
        attend(recorders, "prefill, stream", 4096, True, 128, streams=True)
        for rows in (4000, 3137):
            attend(recorders, "prefill, other counts", rows, True, 128)
            select(recorders, "prefill, other counts", rows, HiPConfig())
            attend(recorders, "prefill, stream, other counts", rows, True, 128, streams=True)
            select(recorders, "prefill, stream, other counts", rows, STREAM)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
