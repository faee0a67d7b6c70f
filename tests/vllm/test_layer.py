"""A layer's pages, the steps of builders, and what is refused: without an engine."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_backend import common, kv_blocks
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("vllm")

from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)

from hipserve import BackendError, ConfigError, HiPConfig
from hipserve.cache import PagedLayer
from hipserve.capacity.scratch import SEARCH_BYTES, scratch_bytes
from hipserve.config import IndexForm
from hipserve.integrations.vllm import (
    backend,
    block_size,
    builder,
    kv_block,
    limits,
    runners,
)
from hipserve.integrations.vllm import layer as vllm_layer
from hipserve.integrations.vllm.runners import StepRequests
from hipserve.integrations.vllm.step import HiPStep, due_runs, found_keys, found_pages
from hipserve.offload import Offload
from hipserve.ops import build_index, write_kv
from hipserve.plan import RefreshSchedule, SequenceStep, bound_levels, runs_of_pages

GIB = 1 << 30


def test_views_of_a_cache_go_with_it() -> None:
    """vLLM drops the tensors of the cache that it measured graphs with, and needs the memory."""
    cache = kv_blocks(4, 64, 2, 64)
    pages = kv_block.pages_of(cache, IndexForm())
    assert kv_block.pages_of(cache, IndexForm()) is pages
    held = StorageWeakRef(cache.untyped_storage())
    del pages
    assert not held.expired()
    del cache
    assert held.expired()


@pytest.mark.parametrize("form", [IndexForm(16, 16), IndexForm(16, 4), IndexForm(None, 8)])
@pytest.mark.parametrize("size", [16, 64, 96, 256])
def test_the_index_of_found_pages_is_made_from_their_keys(size: int, form: IndexForm) -> None:
    cache = kv_blocks(5, size, 2, 64, form)
    pages = kv_block.page_views(cache, form)
    k = torch.randn(5, size, 2, 64)
    pages.pool.k_cache.copy_(k)
    v = pages.pool.v_cache.normal_().clone()
    before = [x.clone() for x in pages.index.tensors()]
    kv_block.rebuild_index(pages, torch.tensor([3, 1]))
    expected = build_index(k, **form._asdict(), backend="reference").tensors()
    assert len(expected) == len(before) == (4 if form == IndexForm(16, 4) else len(before))
    for held, untouched, made in zip(pages.index.tensors(), before, expected, strict=True):
        assert torch.equal(held[[1, 3]], made[[1, 3], : held.shape[1]])
        for page in (0, 2, 4):
            assert torch.equal(as_bytes(held[page]), as_bytes(untouched[page]))
    assert torch.equal(pages.pool.k_cache, k)
    assert torch.equal(pages.pool.v_cache, v)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Of x `[...]`, for comparisons that NaN must not disturb."""
    return x.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("code_bits", [16, 8])
def test_long_runs_of_blocks_are_joined_as_in_a_cache(code_bits: int) -> None:
    """Of what a step writes, of what the one before it wrote, and of what a request finds."""
    form = IndexForm(1, code_bits)
    layout = kv_block.BlockLayout(16, 2, 64, torch.float32, form, 2**17)
    assert layout.joined_length == 256
    assert kv_block.BlockLayout(16, 2, 64, torch.float32, form, 2**15).joined_length is None
    cache = kv_blocks(65, 16, 2, 64, form, 2**17)
    pages = kv_block.page_views(cache, form, 2**17)
    k = torch.randn(1, 1024, 2, 64)
    table = torch.randperm(64)[None].int() + 1
    slots = table[0].long().repeat_interleave(16) * 16 + torch.arange(16).repeat(64)
    held = PagedLayer(16, 1, code_bits)
    for _ in range(33):  # the pool has room for as many keys
        held.append(k, k)
    long = held.index.summaries[torch.tensor(held._tables[0])[15:64:16], -1]
    write_kv(k[0], k[0], pages.pool, pages.index, slots)
    assert not torch.equal(as_bytes(pages.index.summaries[table[0, 15::16], -1]), as_bytes(long))
    for rows, seq_len, started, replayed in (
        (300, 300, False, False),
        (1, 513, False, True),  # the run that ended in the step before
        (1, 768, False, False),
        (24, 1024, True, False),  # found, and written
    ):
        step = common([rows], [seq_len], [False])
        step.block_table_tensor = table
        found = [(0, seq_len - rows)] if started else []
        due = due_runs(step, found, length=256, rows=1, replayed=replayed)
        assert due is not None
        due.join(pages.index)
        end = seq_len // 256
        got = pages.index.summaries[table[0, 15 : end * 16 : 16], -1]
        assert torch.equal(got, long[:end])
    quiet = common([1, 200], [260, 200], [False, True])
    assert due_runs(quiet, [], length=256, rows=1, replayed=False) is None


def test_many_found_pages_are_copied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_block, "COPY_BYTES", 2 * 64 * 2 * 64 * 4)
    pages = kv_block.page_views(kv_blocks(9, 64, 2, 64), IndexForm())
    pages.pool.k_cache.normal_()
    kv_block.rebuild_index(pages, torch.arange(9))
    assert pages.index.summaries is not None
    assert torch.equal(
        pages.index.summaries, build_index(pages.pool.k_cache.contiguous()).summaries
    )


def test_only_requests_that_start_behind_keys_find_some() -> None:
    step = common([5, 1, 40, 7], [105, 80, 40, 307], [True, False, True, True])
    started = frozenset({"a", "c", "b"})  # b was resumed behind its prompt: no row of a prompt
    assert found_keys(step, StepRequests(("a", "b", "c", "d"), started)) == [(0, 100), (1, 79)]
    assert found_keys(step, StepRequests(("a", "b", "c", "d"))) == []


def test_where_nobody_tells_who_starts_every_prompt_does() -> None:
    step = common([5, 1, 40, 7], [105, 80, 40, 307], [True, False, True, True])
    assert found_keys(step, StepRequests(None)) == [(0, 100), (3, 300)]
    assert found_keys(common([1], [80], [False]), StepRequests(None)) == []


def test_pages_of_found_keys_come_once() -> None:
    table = torch.tensor([[7, 8, 9, 0], [7, 8, 5, 6], [1, 2, 3, 4]], dtype=torch.int32)
    pages = found_pages(table, 64, [(0, 130), (1, 192)])
    assert pages is not None
    assert sorted(pages.tolist()) == [5, 7, 8, 9]
    assert found_pages(table, 64, []) is None


def test_the_second_runner_tells_who_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is given to another request tells so by itself: the former one ended."""
    monkeypatch.setattr(runners, "_started", frozenset())
    states = SimpleNamespace(req_id_to_index={"new": 3, "old": 7})
    runner = SimpleNamespace(req_states=states)
    add = runners.noting_the_started(lambda runner, scheduled: "done")
    scheduled = SimpleNamespace(scheduled_new_reqs=[SimpleNamespace(req_id="new")])
    assert add(runner, scheduled) == "done"
    step = common([1, 9], [10, 20], [False, True], req_idx=np.array([7, 3]))
    requests = runners.step_requests(step)
    assert requests == StepRequests((7, 3), frozenset({3}), frozenset({3}))
    add(runner, SimpleNamespace(scheduled_new_reqs=[]))
    assert runners.step_requests(step).started == frozenset()


@pytest.mark.parametrize(
    ("drafts", "connector", "expected"),
    [
        (None, None, "UNIFORM_SINGLE_TOKEN_DECODE"),
        (3, None, "UNIFORM_BATCH"),
        (64, None, "UNIFORM_SINGLE_TOKEN_DECODE"),  # more rows than a query block
        (None, "OffloadingConnector", "UNIFORM_SINGLE_TOKEN_DECODE"),
        (None, "LMCacheConnectorV1", "NEVER"),  # loads while the step runs
    ],
)
def test_which_steps_may_be_captured_whole(
    drafts: int | None, connector: str | None, expected: str
) -> None:
    options: Any = SimpleNamespace(
        additional_config={},
        speculative_config=drafts and SimpleNamespace(num_speculative_tokens=drafts),
        kv_transfer_config=connector and SimpleNamespace(kv_connector=connector),
    )
    spec: Any = None
    assert backend.HiPBuilder.get_cudagraph_support(options, spec).name == expected


def test_what_the_backend_can_and_cannot() -> None:
    can = backend.HiPBackend
    assert can.supports_kv_connector()
    assert can.supports_sink()
    assert not can.supports_device_cpu_query_lens_mismatch()
    assert can.supports_head_size(128)
    assert not can.supports_head_size(100)
    reasons = "\n".join(
        can.validate_configuration(
            100, torch.bfloat16, "auto", 64, False, False, False, True, False, None, "decoder",
            use_adaptive_verification=True,
        )
    )  # fmt: skip
    assert "head_size not supported" in reasons
    assert "query lens mismatch" in reasons
    assert "--language-model-only or --limit-mm-per-prompt" in reasons


@pytest.mark.parametrize(("cache", "hint"), [("bfloat16", "--dtype bfloat16"), ("fp8", "--dense")])
def test_keys_are_kept_as_the_model_computes(cache: str, hint: str) -> None:
    limits.check_cache_dtype("auto", "float32")
    limits.check_cache_dtype("float32", "float32")
    with pytest.raises(ConfigError, match=f"float32, as the model computes, got {cache}.*{hint}"):
        limits.check_cache_dtype(cache, "float32")


def test_steps_that_a_gpu_repeats_have_no_meter() -> None:
    metered = HiPConfig(meter="sampled")
    limits.check_meter(metered, "cpu", None)
    limits.check_meter(HiPConfig(), "cuda", Offload(host_memory=9, file="kv"))
    with pytest.raises(ConfigError, match='meter: expected "off" on a GPU in vLLM'):
        limits.check_meter(metered, "cuda", None)
    with pytest.raises(ConfigError, match='meter: expected "off" with offload'):
        limits.check_meter(metered, "cpu", Offload(host_memory=9, file="kv"))


@pytest.mark.parametrize("size", [96, 320, 1152])
def test_any_multiple_of_the_finest_run_is_a_block_size(size: int) -> None:
    limits.check_block_size(size, HiPConfig())
    assert all(size % length == 0 for length in bound_levels(size, 16, runs_of_pages(size, 16)))
    with pytest.raises(ConfigError, match="block_size: expected a multiple of 16"):
        limits.check_block_size(size + 8, HiPConfig())


def test_vllm_may_copy_and_extend_a_step() -> None:
    """As its chunked local attention and its fast prefill do."""
    step: Any = HiPStep(1, torch.zeros(1), None, False, "")  # type: ignore[arg-type]
    step.make_virtual_batches_block_table = len

    class Copied(HiPStep):
        def __init__(self, step: HiPStep) -> None:
            for field in fields(step):
                setattr(self, field.name, getattr(step, field.name))

    assert Copied(step).num_tokens == 1


SPEC = FullAttentionSpec(block_size=64, num_kv_heads=2, head_size=64, dtype=torch.float32)


def test_only_blocks_of_full_attention_are_padded() -> None:
    padded = backend.HiPBackend.customize_spec(SPEC)
    assert padded.page_size_bytes == kv_block.BlockLayout.of(SPEC, HiPConfig()).padded_bytes
    sizes: Any = {"block_size": 64, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    for spec in (
        SlidingWindowSpec(sliding_window=128, **sizes),
        FullAttentionSpec(**{**sizes, "block_size": 1}),  # vLLM asks for the bytes of a token
    ):
        assert backend.HiPBackend.customize_spec(spec) == spec


def test_blocks_are_padded_as_the_engine_is_configured() -> None:
    """vLLM's model runners ask the class for its specs, which has no other way to know."""
    ask = runners.showing_configuration(lambda _: backend.HiPBackend.customize_spec(SPEC))
    for options in ({"bound_block_size": 32}, {"selector": "tree"}):
        model = SimpleNamespace(max_model_len=2**20)
        engine = SimpleNamespace(additional_config={"hip": options}, model_config=model)
        layout = kv_block.BlockLayout.of(SPEC, HiPConfig.from_dict(options), 2**20)
        assert ask(SimpleNamespace(vllm_config=engine)).page_size_bytes == layout.padded_bytes
    assert backend.HiPBackend.customize_spec(SPEC).page_size_bytes > layout.padded_bytes


class Layer(SimpleNamespace):
    """An attention layer with the parts of `HiPImpl` that a builder asks."""


def layers(count: int, config: HiPConfig) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for i in range(count):
        schedule = RefreshSchedule(4, config.refresh_interval)
        impl = SimpleNamespace(
            schedule=schedule, is_local=lambda _: False, is_dense=lambda _: False,
            keeps_index=lambda _: True, longest=4096,
        )  # fmt: skip
        made[f"layers.{i}"] = Layer(impl=impl, layer_name=f"layers.{i}")
    return made


def build(config: HiPConfig, spec: Any, made: dict[str, Any]) -> builder.HiPBuilder:
    model: Any = {"max_model_len": 4096, "dtype": torch.float32}
    options: Any = SimpleNamespace(
        additional_config={"hip": config.to_dict()},
        speculative_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        compilation_config=SimpleNamespace(static_forward_context=made),
        model_config=SimpleNamespace(**model, get_num_attention_heads=lambda _: 2),
        cache_config=SimpleNamespace(num_gpu_blocks=8),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        instance_id="test",
    )
    return builder.HiPBuilder(spec, list(made), options, torch.device("cpu"))


def test_builders_of_a_group_share_slots() -> None:
    """vLLM has one for each half of a batch (`--enable-dbo`), and one set of selections a layer."""
    config = HiPConfig(dense_below=0, refresh_interval=4)
    made = layers(2, config)
    spec = backend.HiPBackend.customize_spec(SPEC)
    first, second = build(config, spec, made), build(config, spec, made)
    slots = [
        one.schedule.step([SequenceStep(request, 4000, decoding=True)])[0][0]
        for one, request in ((first, 0), (second, 1))
    ]
    assert len(set(slots)) == 2


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_of_single_rows_writes_them_at_once(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = HiPConfig(dense_below=0), dict[str, Any]()
    spec = backend.HiPBackend.customize_spec(SPEC)
    starts = torch.tensor([0, 1, 1 + rows], dtype=torch.int32)
    batch: Any = SimpleNamespace(
        num_reqs=2,
        max_query_len=rows,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([9, 40], dtype=torch.int32),
        block_table_tensor=torch.tensor([[1], [2]], dtype=torch.int32),
        slot_mapping=torch.arange(1 + rows),
        is_prefilling=torch.zeros(2, dtype=torch.bool),
        seq_lens_cpu_upper_bound=None,
        req_idx=None,
    )
    step = build(config, spec, layers(1, config)).build(0, batch)
    monkeypatch.setattr(vllm_layer, "write_kv", lambda *_, **options: found.update(options))
    pages: Any = SimpleNamespace(pool=None, index=None)
    k = torch.zeros(1 + rows, 2, 64)
    vllm_layer.BlockKeys(pages, step, (k, k), keeps_index=False).append()
    assert found["apart"] == (rows == 1)
    assert found["whole_runs"]


def test_blocks_that_are_not_what_they_should_be_are_refused() -> None:
    with pytest.raises(BackendError, match=r"layers.0 .FullAttentionSpec. has .* bytes, but with"):
        build(HiPConfig(), SPEC, layers(1, HiPConfig()))
    cross = CrossAttentionSpec(block_size=64, num_kv_heads=2, head_size=64, dtype=torch.float32)
    with pytest.raises(BackendError, match=r"cannot read the KV cache of layers.0 .CrossAtt"):
        build(HiPConfig(), cross, layers(1, HiPConfig()))


def test_the_scratch_of_a_search_is_counted() -> None:
    triton = pytest.importorskip("hipserve.ops.select_blocks.triton", exc_type=ImportError)
    assert scratch_bytes(1, 1, 16, 2, HiPConfig()) > triton.SCRATCH_BYTES == SEARCH_BYTES


MODELS = {"8B": (32 * 8, 15), "32B": (64 * 8, 61), "70B, TP 4": (80 * 2, 33)}
"""Layers times KV heads of a GPU, and GiB of weights in bfloat16 there."""

CARDS = {24: 24_564, 48: 46_068, 80: 81_559}
"""MiB of an RTX 4090, an L40S and an H100."""


@pytest.mark.parametrize(
    ("model", "card", "captured", "expected"),
    [
        ("8B", 24, 256, 64),
        ("8B", 48, 256, 128),
        ("8B", 80, 512, 128),
        ("32B", 80, 512, 64),
        ("70B, TP 4", 48, 256, 256),
        ("70B, TP 4", 80, 512, 128),
    ],
)
def test_what_measuring_graphs_takes_fits_beside_the_weights(
    model: str, card: int, captured: int, expected: int
) -> None:
    heads, weights = MODELS[model]
    token, memory = 2 * heads * 128 * 2, CARDS[card] << 20
    assert block_size.largest(token, captured, memory) == expected
    taken = block_size.measuring_bytes(token, captured, expected)
    layout = kv_block.BlockLayout(expected, heads, 128, torch.bfloat16, IndexForm())
    assert layout.padded_bytes * captured <= taken <= 1.03 * layout.padded_bytes * captured
    scratch = scratch_bytes(8192, 64, 128, 2, HiPConfig())
    assert weights * GIB + taken + scratch <= 0.92 * memory
    assert block_size.largest(token, 0, memory) == 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("keys", [0, 2**20])
@pytest.mark.parametrize("code_bits", [16, 8, 4])
@pytest.mark.parametrize("size", [64, 256])
def test_the_index_of_blocks_is_counted_with_codes_too(
    size: int, code_bits: int, keys: int, dtype: torch.dtype
) -> None:
    heads, fp8 = 256, dtype.itemsize == 1
    token = 2 * heads * 128 * dtype.itemsize
    form = IndexForm(16, code_bits)
    layout = kv_block.BlockLayout(size, heads, 128, dtype, form, keys)
    taken = block_size.measuring_bytes(token, 8, size, code_bits, fp8=fp8)
    assert layout.padded_bytes * 8 <= taken <= 1.05 * layout.padded_bytes * 8
