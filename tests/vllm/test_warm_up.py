"""What is compiled before the first request of an engine on a GPU."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm.v1.kv_cache_interface import FullAttentionSpec

from hipserve import HiPConfig
from hipserve.integrations.vllm.step import HiPStep
from hipserve.integrations.vllm.warm_up import (
    Limits,
    chunk_steps,
    compile_kernels,
    empty_blocks,
    make_step,
)
from hipserve.ops.block_sparse_attention.triton import launch as attention
from hipserve.ops.block_sparse_attention.triton import tiling as attention_tiling
from hipserve.ops.select_blocks.operator import search_inputs
from hipserve.ops.select_blocks.spec import search_spec
from hipserve.ops.select_blocks.triton import barrier
from hipserve.ops.select_blocks.triton import launch as selection
from hipserve.ops.select_blocks.triton import tiling as selection_tiling
from hipserve.ops.write_kv.layout import IndexLayout
from hipserve.plan import pruning_rule
from hipserve.types import BlockSelection

PAGE = 256
SIZES: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 2,
    "head_size": 64,
    "dtype": torch.bfloat16,
}
LIMITS = Limits(tokens=8192, requests=256, longest=131072)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Any]]:
    """What kernels are compiled for, on a card like an H100 or an L4: nothing is launched."""
    found: set[Any] = set()

    def launch(name: str, *_: Any, **options: Any) -> None:
        found.add((name, *sorted(options.items(), key=lambda option: option[0])))

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return functools.partial(launch, self.name)

    for module in (attention, selection):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(name))
    monkeypatch.setattr(attention, "make_shape", lambda call: None)
    monkeypatch.setattr(attention_tiling, "gpu_shared_memory", lambda device: 232448)
    monkeypatch.setattr(barrier, "gpu_processors", lambda device: 132)
    for module in (attention_tiling, selection_tiling):
        monkeypatch.setattr(module, "chains_launches", lambda device: True)
    plans = attention_tiling.plan, selection_tiling.plan
    for plan in plans:
        plan.cache_clear()
    yield found
    for plan in plans:
        plan.cache_clear()


def launch_all(requests: list[tuple[int, int]], config: HiPConfig, heads: tuple[int, int]) -> None:
    """What a step of such requests launches."""
    table = torch.zeros(len(requests), LIMITS.longest // PAGE, dtype=torch.int32)
    step = make_step(requests, table, pruning_rule(config, "cuda"), selects=True)
    layout, rule = step.plan.layout, step.plan.rule
    q = torch.empty(step.num_tokens, heads[0], 128, dtype=torch.bfloat16)
    pages = torch.empty(2, PAGE, heads[1], 128, dtype=torch.bfloat16)
    blocks = layout.query_blocks(rule.query_block_size)
    chosen = None
    if step.selects:
        index = IndexLayout.of_pages(PAGE, 128, pages.dtype, config.index_form).empty_like(pages)
        shape = (len(blocks), heads[1], config.max_selected)
        kept = torch.zeros(shape, dtype=torch.int32), layout.window_starts(rule)
        chosen = BlockSelection(*kept)
        inputs = search_inputs(
            q,
            index,
            block_table=table,
            query_blocks=blocks,
            window_starts=chosen.window_start,
            config=config,
            rope=None,
        )
        selection.refresh_blocks(inputs, search_spec(config, False), None, chosen)
    attention.block_sparse_attention(
        *(q, pages, pages, table, blocks),
        *((None, None) if chosen is None else (chosen.indices, chosen.window_start)),
        num_sink_tokens=config.num_sink_tokens,
        key_block_size=config.key_block_size,
        sliding_window=0,
        sm_scale=0.1,
        v_scale=1.0,
        softcap=0.0,
        query_block_size=config.query_block_size,
        lists=None,
        page_size=PAGE,
        rope=None,
        trained_length=0,
    )


@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (64, 8), (8, 8), (28, 4)])
def test_steps_find_their_kernels(launched: set[Any], heads: tuple[int, int]) -> None:
    """Chunks of any length at any position, alone and beside requests that decode."""
    config = HiPConfig(dense_below=8192, decode_dense_below=24576)
    for requests in chunk_steps(LIMITS, config.query_block_size):
        launch_all(requests, config, heads)
    compiled = set(launched)
    assert {name for name, *_ in compiled} == {
        "attention_kernel",
        "baseline_kernel",
        "search_kernel",
    }
    rng = random.Random(f"steps {heads}")
    for _ in range(150):
        rows = rng.choice([rng.randint(2, 80), rng.randint(2, LIMITS.tokens)])
        beside = rng.choice([0, rng.randint(0, min(LIMITS.requests - 1, LIMITS.tokens - rows))])
        first = rng.choice([0, 64 * rng.randint(0, (LIMITS.longest - rows) // 64)])
        others = [(1, rng.randrange(LIMITS.longest)) for _ in range(beside)]
        launch_all([*others, (rows, first)], config, heads)
        assert launched == compiled, (rows, beside, first)


class Layer:
    """Notes the steps that it is run with."""

    def __init__(self, kind: str, dense: bool = False) -> None:
        self.impl = self
        self.device, self.compiled = torch.device("cpu"), False
        self.num_heads, self.num_kv_heads, self.head_size = 4, 2, 64
        self.name, self.dense, self.steps = kind, dense, []

    def kind(self, layer: Any) -> str:
        return layer.name

    def is_dense(self, layer: Any) -> bool:
        return layer.dense

    def keeps_index(self, layer: Any) -> bool:
        return layer is None

    def forward(
        self,
        layer: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: HiPStep,
        output: torch.Tensor,
    ) -> None:
        step = attn_metadata
        assert q.shape == output.shape == (step.num_tokens, 4, 64)
        assert k.shape == v.shape == (step.num_tokens, 2, 64)
        assert kv_cache.shape == (2, 2, 16, 128)
        assert (step.slot_mapping == -1).all()
        assert not step.plan.layout.block_table.any()
        layer.steps.append(step)


def test_every_kind_of_layer_is_run_in_blocks_of_no_request() -> None:
    layers = {name: Layer(name[0], name[0] == "d") for name in ("p0", "d1", "p2")}
    spec = FullAttentionSpec(**SIZES)
    rule = pruning_rule(HiPConfig(budget=64, dense_below=128, sliding_window=64), "cpu")
    compile_kernels(layers, spec, rule, torch.bfloat16, Limits(300, 4, 1024))
    pruned, dense, same = (layer.steps for layer in layers.values())
    assert not same
    assert len(pruned) == len(dense) == len(list(chunk_steps(Limits(300, 4, 1024), 64)))
    assert {step.num_tokens for step in pruned} >= {2, 3, 5, 9, 17, 33, 65, 129, 257, 300}
    assert {step.selects for step in pruned} == {True, False}
    assert not any(step.selects for step in dense)


@pytest.mark.parametrize("limits", [(8192, 4, 2048), (2048, 256, 1000), (64, 1, 40), (1, 1, 64)])
def test_steps_are_those_of_an_engine(limits: tuple[int, int, int]) -> None:
    tokens, requests, longest = limits
    steps = list(chunk_steps(Limits(*limits), 64))
    assert steps
    for step in steps:
        assert sum(rows for rows, _ in step) <= tokens
        assert len(step) <= requests
        assert all(0 < rows <= first + rows <= longest for rows, first in step)


def test_a_kernel_that_does_not_compile_ends_the_start() -> None:
    layer = Layer("p")
    layer.head_size = 32  # not what its steps hold
    spec = FullAttentionSpec(**SIZES)
    rule = pruning_rule(HiPConfig(), "cpu")
    with pytest.raises(AssertionError):
        compile_kernels({"p": layer}, spec, rule, torch.bfloat16, Limits(64, 4, 1024))


def test_blocks_have_the_shape_of_an_engines() -> None:
    spec = FullAttentionSpec(**SIZES, page_size_padded=16384)
    blocks = empty_blocks(spec, torch.device("cpu"))
    assert blocks.shape == (2, 2, 16, 128)
    assert blocks.stride() == (8192, 128, 256, 1)
    assert not blocks.any()
