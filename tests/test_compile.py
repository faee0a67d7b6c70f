"""torch.compile sees custom operators whole: no graph breaks, the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends import NATIVE
from hipserve import ArgumentError, HiPConfig, hip_attention
from hipserve.ops import select_blocks
from hipserve.ops.block_sparse_attention import operator as attention
from hipserve.ops.rope import pack_rope
from hipserve.ops.select_blocks import operator as selection
from hipserve.ops.select_blocks.spec import search_spec
from hipserve.ops.write_kv import api as writing
from hipserve.plan import pruning_rule
from hipserve.selectors import SELECTORS
from hipserve.testing.cases import Case, Shape, make_case
from tiny_models import PRUNED, build, prompts

CONFIG = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32, dense_below=0)
BACKENDS = ["reference", "cpu"] if NATIVE else ["reference"]
every = pytest.mark.parametrize("backend", BACKENDS)


def qkv(batch: int = 1) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 128, 4, 64), *torch.randn(2, batch, 900, 2, 64)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_hip_attention_compiles_without_a_break(compiler: str, selector: str) -> None:
    torch.compiler.reset()
    config = CONFIG.replace(selector=selector)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, lse = hip_attention(q * 2, k, v, config=config, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    for batch in (1, 2):
        q, k, v = qkv(batch)
        for got, expected in zip(compiled(q, k, v), layer(q, k, v), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("config", [None, HiPConfig(budget=64)])
def test_a_device_settles_what_a_configuration_leaves_open(config: HiPConfig | None) -> None:
    torch.compiler.reset()
    q, k, v = qkv()
    compiled = torch.compile(
        lambda *x: hip_attention(*x, config=config), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(q, k, v), hip_attention(q, k, v, config=config))


def case(config: HiPConfig = CONFIG) -> Case:
    return make_case(Shape((700, 130), (100, 1)), config.index_form)


def rope(c: Case) -> torch.Tensor:
    """Some turns of pairs in halves."""
    dim = c.q.shape[-1]
    return pack_rope(torch.arange(dim).roll(dim // 2), torch.linspace(-1, 1, dim).double())


@every
def test_select_blocks_is_a_lawful_operator(backend: str) -> None:
    streams = {"extend": "stream", "trained_length": 600}
    for changes in ({}, {"share_group": False}, {"selector": "tree"}, {"code_bits": 4}, streams):
        config = CONFIG.replace(**changes)
        c = case(config)
        blocks = c.layout.query_blocks(config.query_block_size)
        starts = c.layout.window_starts(pruning_rule(config, "cpu"))
        where = (c.layout.block_table, blocks, starts)
        inputs = selection.search_inputs(c.q, c.index, *where, config=config, rope=rope(c))
        search = search_spec(config).dumps()
        torch.library.opcheck(selection._operator, (*inputs, search, backend))


@every
def test_block_sparse_attention_is_a_lawful_operator(backend: str) -> None:
    c = case()
    blocks = c.layout.query_blocks(CONFIG.query_block_size)
    chosen = select_blocks(c.q, c.index, c.layout, config=CONFIG, backend=backend)
    pages = (c.kv.pool.k_cache.nan_to_num(), c.kv.pool.v_cache.nan_to_num(), c.layout.block_table)
    sizes = (CONFIG.num_sink_tokens, CONFIG.key_block_size)
    numbers = (*sizes, 0, 0.125, 1.0, 30.0, CONFIG.query_block_size, None, pages[0].shape[1])
    for read in ((chosen.indices, chosen.window_start), (None, None)):
        for positions in ((None, 0), (rope(c), 600)):
            inputs = (c.q, *pages, blocks, *read, *numbers, *positions, backend)
            torch.library.opcheck(attention._operator, inputs)


@every
def test_write_kv_and_build_index_are_lawful_operators(backend: str) -> None:
    k, slots = torch.randn(20, 2, 64), torch.arange(20)
    for code_bits in (16, 4):
        kv = case(CONFIG.replace(code_bits=code_bits)).kv.map(torch.nan_to_num)
        pages, index = (kv.pool.k_cache, kv.pool.v_cache), kv.index.parts
        operands = (k, k, *pages, slots, *index, 16, code_bits, 1.0, 1.0, backend)
        torch.library.opcheck(writing._write_operator, operands)
        torch.library.opcheck(writing._build_operator, (pages[0], 16, code_bits, backend))


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_a_model_compiles_with_settings_that_nobody_read_before(use_cache: bool) -> None:
    """The first call is the compiled one, and settings changed later are heeded."""
    torch.compiler.reset()
    ids = prompts(1, 200)
    compiled = torch.compile(build("llama", PRUNED), backend="eager")
    expected = build("llama", PRUNED)(ids).logits
    torch.testing.assert_close(compiled(ids, use_cache=use_cache).logits, expected)
    compiled.config.hip = {**PRUNED, "dense_below": 10_000}
    dense = build("llama", {"dense_below": 10_000})(ids).logits
    torch.testing.assert_close(compiled(ids, use_cache=use_cache).logits, dense)
    assert (dense - expected).abs().max() > 0.1, "nothing was pruned"


@torch.no_grad()
def test_packed_sequences_are_refused_compiled_too() -> None:
    torch.compiler.reset()
    compiled = torch.compile(build("llama"), backend="eager")
    positions = torch.arange(30).repeat(2)[None]
    with pytest.raises(ArgumentError, match="attention_mask: expected a causal or sliding"):
        compiled(prompts(1, 60), position_ids=positions, use_cache=False)
