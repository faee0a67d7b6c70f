"""Steps that vLLM replays as one graph never read more tiles than there are: without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_backend import common

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from hipserve import BackendError, HiPConfig
from hipserve.cache.tiles import TilesRead, most_row_tiles, row_tiles
from hipserve.integrations.vllm import graphs
from hipserve.integrations.vllm.builder import HiPBuilder
from hipserve.integrations.vllm.parts import Room
from hipserve.offload import slot_bytes
from hipserve.plan import DecodeBuffers, pruning_rule

SLOT = slot_bytes(8, 128, 2)
SIZES = [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("settings", "longest", "tiles"),
    [
        ({}, 131072, 1536),  # the last row that reads everything, below the crossover
        ({"refresh_interval": 8}, 131072, 1537),  # a row may use a selection of 7 rows before
        ({}, 4096, 256),
        ({"decode_dense_below": 0}, 131072, 101),
        ({"decode_dense_below": 0}, 600, 38),
    ],
)
def test_what_a_row_may_read(settings: dict[str, Any], longest: int, tiles: int) -> None:
    config = HiPConfig(code_bits=4, **settings)
    assert most_row_tiles(config, pruning_rule(config, "cuda"), longest) == tiles


@pytest.mark.parametrize("interval", [1, 8])
@pytest.mark.parametrize("below", [0, 700, 2000])
@pytest.mark.parametrize("longest", [1, 90, 1200])
def test_no_row_reads_more(interval: int, below: int, longest: int) -> None:
    sizes: dict[str, Any] = {"budget": 128, "sliding_window": 64, "num_sink_tokens": 16}
    config = HiPConfig(refresh_interval=interval, decode_dense_below=below, **sizes)
    rule = pruning_rule(config, "cuda")
    rows = [TilesRead.of_blocks([[0, 0, 1, p]], config, rule).most_tiles for p in range(longest)]
    assert max(rows) == most_row_tiles(config, rule, longest)


def engine(device_memory: int, longest: int = 131072, **settings: Any) -> Any:
    """The configuration of an engine with two layers of 32 and 8 heads of 128 in bfloat16."""
    offload = {"host_memory": "1GiB", "device_memory": device_memory}
    impl = SimpleNamespace(num_heads=32, num_kv_heads=8, head_size=128)
    layers = {f"layers.{i}": SimpleNamespace(impl=impl, kv_cache=None) for i in range(2)}
    compilation = SimpleNamespace(
        static_forward_context={**layers, "other": object()},
        cudagraph_capture_sizes=SIZES,
        max_cudagraph_capture_size=SIZES[-1],
        compile_sizes=[],
        cudagraph_specialize_lora=False,
    )
    return SimpleNamespace(
        additional_config={"hip": {"code_bits": 4, "rerank": 8, "offload": offload, **settings}},
        parallel_config=SimpleNamespace(world_size=1),
        model_config=SimpleNamespace(dtype=torch.bfloat16, max_model_len=longest),
        compilation_config=compilation,
        device_config=SimpleNamespace(device_type="cuda"),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
    )


def tiles_for(rows: int, of_row: int = 1536) -> int:
    """Bytes of device_memory that two layers divide."""
    return 2 * rows * of_row * SLOT


@pytest.mark.parametrize(
    ("memory", "settings", "rows"),
    [
        (tiles_for(5), {}, 5),
        (tiles_for(5) - 1, {}, 4),
        (tiles_for(1) - 1, {}, 0),
        (tiles_for(1), {"decode_dense_below": 0}, 1536 // row_tiles(HiPConfig())),
        (tiles_for(5), {"share_group": False}, 1),  # every query head has a list of its own
    ],
)
def test_how_many_rows_a_graph_may_have(memory: int, settings: dict[str, Any], rows: int) -> None:
    asked, spec = engine(memory, **settings), SimpleNamespace()
    room = graphs.room_of(asked)
    assert room is not None
    assert room.rows == rows
    support = HiPBuilder.get_cudagraph_support(asked, spec).name  # type: ignore[arg-type]
    assert support == ("UNIFORM_SINGLE_TOKEN_DECODE" if rows else "NEVER")


def test_keys_in_a_file_and_beside_the_model_have_no_arena() -> None:
    asked, spec = engine(tiles_for(5)), SimpleNamespace()
    asked.additional_config["hip"]["offload"] = {"host_memory": "1GiB", "file": "/nvme/kv"}
    assert graphs.room_of(asked) is None
    support = HiPBuilder.get_cudagraph_support(asked, spec)  # type: ignore[arg-type]
    assert support.name == "NEVER"
    del asked.additional_config["hip"]["offload"]
    assert graphs.room_of(asked) is None


@pytest.mark.parametrize("rows", [1, 3, 4, 40])
def test_the_first_runner_replays_what_fits(rows: int) -> None:
    asked = engine(tiles_for(rows))
    dispatcher: Any = object.__new__(CudagraphDispatcher)
    dispatcher.vllm_config, dispatcher.compilation_config = asked, asked.compilation_config
    dispatcher.cudagraph_keys = {CUDAGraphMode.PIECEWISE: set(), CUDAGraphMode.FULL: set()}
    dispatcher.uniform_decode_query_len, dispatcher.specialize_lora_count = 1, False
    initialize = graphs.keeping_what_fits(CudagraphDispatcher.initialize_cudagraph_keys)
    initialize(dispatcher, CUDAGraphMode.FULL_AND_PIECEWISE, 1)
    for requests in range(1, 17):
        padded = next(size for size in SIZES if size >= requests)
        mode, key = dispatcher.dispatch(requests, uniform_decode=True)
        whole = padded <= rows
        assert mode == (CUDAGraphMode.FULL if whole else CUDAGraphMode.PIECEWISE)
        assert key.num_tokens == padded


@pytest.mark.parametrize("rows", [1, 3, 4, 40])
def test_the_second_runner_captures_what_fits(rows: int) -> None:
    utils: Any = pytest.importorskip("vllm.v1.worker.gpu.cudagraph_utils")
    manager: Any = object.__new__(utils.CudaGraphManager)
    asked = engine(tiles_for(rows))
    values: dict[str, Any] = {
        "vllm_config": asked,
        "compilation_config": asked.compilation_config,
        "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE,
        "max_num_reqs": 16,
        "decode_query_len": 1,
        "varlen_decode": False,
        "lora_capture_cases": [0],
        "ubatch_runner": None,
        "_capture_descs": {},
        "_candidates": {},
    }
    for name, value in values.items():
        setattr(manager, name, value)
    graphs.making_what_fits(utils.CudaGraphManager._init_candidates)(manager)
    assert manager.max_num_reqs == 16
    captured = manager._capture_descs
    assert {d.num_reqs for d in captured[CUDAGraphMode.FULL]} == {n for n in SIZES if n <= rows}
    assert sorted(d.num_tokens for d in captured[CUDAGraphMode.PIECEWISE]) == SIZES


def test_an_engine_without_an_arena_captures_as_before() -> None:
    asked = engine(tiles_for(1))
    del asked.additional_config["hip"]["offload"]
    seen: list[int] = []
    manager = SimpleNamespace(vllm_config=asked, max_num_reqs=16)
    graphs.making_what_fits(lambda manager: seen.append(manager.max_num_reqs))(manager)
    assert seen == [16]


def builder(requests: int) -> Any:
    """One whose arena has tiles for so many."""
    config = HiPConfig(code_bits=4)
    rule = pruning_rule(config, "cuda")
    made: Any = object.__new__(HiPBuilder)
    made.config, made.verified_rows, made.replayed_requests = config, 1, requests
    made.room = Room(1536 * requests, 1, config, rule, 131072)
    made.buffers = DecodeBuffers(16, torch.device("cpu"))
    return made


def test_steps_of_single_rows_that_fit_are_those_of_a_graph() -> None:
    made = builder(2)
    assert made._replayed_rows(common([1, 1], [30, 40], [False] * 2)) == 1
    assert made._replayed_rows(common([1, 1, 1], [30, 40, 50], [False] * 3)) == 0
    assert made._replayed_rows(common([1, 2], [30, 40], [False] * 2)) == 0


def test_a_graph_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BackendError, match="a step of 3 requests, and there are tiles for 2"):
        builder(2).build_for_cudagraph_capture(common([1] * 3, [9] * 3, [False] * 3))
