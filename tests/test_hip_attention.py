"""Laws that join selection and attention."""

from __future__ import annotations

import random
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hipserve
from backends import every_backend, using
from hipserve import HiPConfig
from hipserve.attention import AttentionLayer, HeldKeys, SelectionReuse
from hipserve.attention.crossover import rule_of
from hipserve.ops import write_kv
from hipserve.plan import BatchLayout
from hipserve.plan.rule import BREAK_EVEN
from hipserve.selectors import SELECTORS
from hipserve.testing.cases import Shape, attend, empty_pages
from hipserve.types import KeyPool

SEEDS = st.integers(0, 2**31 - 1)
SMALL = {"budget": 64, "num_sink_tokens": 16, "sliding_window": 32, "dense_below": 0}
selectors = pytest.mark.parametrize("selector", SELECTORS)
searches = pytest.mark.parametrize(
    "search", [{"selector": name, "code_bits": bits} for name in SELECTORS for bits in (16, 4)]
)


def qkv(query_len: int, kv_len: int, dtype: torch.dtype = torch.float32, batch: int = 1):
    q = torch.randn(batch, query_len, 4, 64).to(dtype)
    k, v = torch.randn(2, batch, kv_len, 2, 64).to(dtype)
    return q, k, v


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    n, m = q.shape[1], k.shape[1]
    mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    parts = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


@every_backend
@given(seed=SEEDS)
def test_a_budget_of_everything_is_dense(backend: str, seed: int) -> None:
    rng = random.Random(seed)
    kv_len = rng.choice([1, 2, 63, 64, 65, 257, 700])
    q, k, v = qkv(rng.randint(1, kv_len), kv_len, batch=2)
    config = HiPConfig(budget=1024, dense_below=0, sliding_window=16, num_sink_tokens=16)
    with using(backend) as name:
        out = hipserve.hip_attention(q, k, v, config=config, backend=name)
    torch.testing.assert_close(out, sdpa(q, k, v), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("head_dim", [8, 40, 63, 100, 520])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_dim_that_the_kernels_do_not_take_is_computed_all_the_same(
    head_dim: int, dtype: torch.dtype
) -> None:
    q = torch.randn(1, 90, 4, head_dim).to(dtype)
    k, v = torch.randn(2, 1, 300, 2, head_dim).to(dtype)
    pages = KeyPool(torch.empty(2, 256, 2, head_dim, dtype=dtype), v.new_empty(2, 256, 2, head_dim))
    write_kv(k[0], v[0], pages, None, torch.arange(300))
    assert torch.equal(pages.k_cache.flatten(0, 1)[:300], k[0])
    close = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for config in (HiPConfig(), HiPConfig(**SMALL).replace(budget=320)):
        out = hipserve.hip_attention(q, k, v, config=config)
        torch.testing.assert_close(out, sdpa(q, k, v), **close)
    step = hipserve.hip_attention(q, k, v, config=HiPConfig(**SMALL))
    same = hipserve.hip_attention(q, k, v, config=HiPConfig(**SMALL), backend="reference")
    assert torch.equal(step, same)
    with pytest.raises(hipserve.BackendError, match=f"multiples of 16 to 512, not {head_dim}"):
        hipserve.hip_attention(q, k, v, backend="cpu")


@every_backend
@selectors
def test_the_last_row_is_a_decode_step(backend: str, selector: str) -> None:
    q, k, v = qkv(40, 900)
    config = HiPConfig(selector=selector, query_block_size=1, query_stride=1, **SMALL)
    with using(backend) as name:
        whole = hipserve.hip_attention(q, k, v, config=config, backend=name)
        step = hipserve.hip_attention(q[:, -1:], k, v, config=config, backend=name)
    assert torch.equal(whole[:, -1:], step)


@every_backend
@selectors
def test_a_single_row_reads_all_where_bounds_would_have_to(backend: str, selector: str) -> None:
    q, k, v = qkv(1, 3 * BREAK_EVEN["cpu"] + 100)
    config = HiPConfig(selector=selector, **(SMALL | {"dense_below": None}))
    with using(backend) as name:
        out = hipserve.hip_attention(q, k, v, config=config, backend=name)
        pruned = hipserve.hip_attention(q, k, v, config=HiPConfig(**SMALL), backend=name)
    error = (out - sdpa(q, k, v)).abs().max()
    assert (error < 2e-5) == (selector != "tree")
    assert (pruned - sdpa(q, k, v)).abs().max() > 1e-3  # as a caller asks who sets dense_below


class Sequence:
    """One sequence that grows in pages, as an engine would hold it."""

    def __init__(self, length: int, config: HiPConfig, backend: str, dtype: torch.dtype) -> None:
        pages, self.size, self.backend, self.config = -(-length // 256), 256, backend, config
        shape = Shape((length,), (1,), page_size=self.size, dtype=dtype)
        self.kv = empty_pages(pages, shape, config.index_form)
        self.table = torch.randperm(pages).int()
        self.length = 0

    def extend(self, q, k, v, reuse: SelectionReuse | None = None) -> torch.Tensor:
        positions = torch.arange(self.length, self.length + len(k))
        slots = self.table[positions // self.size].long() * self.size + positions % self.size
        write_kv(k, v, self.kv.pool, self.kv.index, slots, backend=self.backend)
        self.length += len(k)
        layout = BatchLayout(
            self.table[None],
            torch.tensor([self.length], dtype=torch.int32),
            torch.tensor([0, len(k)], dtype=torch.int32),
        )
        return attend(q, self.kv, layout, self.config, reuse, backend=self.backend)[0]


@every_backend
@searches
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_prefill_equals_one_pass(
    backend: str, search: dict[str, Any], dtype: torch.dtype
) -> None:
    q, k, v = (x[0] for x in qkv(1000, 1000, dtype))
    config = HiPConfig(**search, **SMALL)
    with using(backend) as name:
        whole = Sequence(1000, config, name, dtype).extend(q, k, v)
        cut = Sequence(1000, config, name, dtype)
        edges = [0, 64, 320, 896, 1000]
        parts = [cut.extend(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


@every_backend
@searches
def test_pages_equal_whole_sequences(backend: str, search: dict[str, Any]) -> None:
    q, k, v = qkv(1000, 1000)
    config = HiPConfig(**search, **SMALL)
    with using(backend) as name:
        plain = hipserve.hip_attention(q, k, v, config=config, backend=name)
        paged = Sequence(1000, config, name, torch.float32).extend(q[0], k[0], v[0])
    assert torch.equal(plain[0], paged)


@every_backend
@searches
def test_later_keys_change_no_earlier_row(backend: str, search: dict[str, Any]) -> None:
    q, k, v = qkv(1280, 1280)
    config = HiPConfig(**search, **{**SMALL, "sliding_window": 1})
    with using(backend) as name:
        long = hipserve.hip_attention(q, k, v, config=config, backend=name)
        short = hipserve.hip_attention(
            q[:, :960], k[:, :960], v[:, :960], config=config, backend=name
        )
    assert torch.equal(long[:, :960], short)


@every_backend
def test_a_selection_serves_refresh_interval_steps_and_the_window_grows(backend: str) -> None:
    q, k, v = (x[0] for x in qkv(700, 700))
    config = HiPConfig(refresh_interval=4, **SMALL)
    size = config.key_block_size
    with using(backend) as name:
        sequence, reuse = Sequence(700, config, name, torch.float32), SelectionReuse()
        sequence.extend(q[:690], k[:690], v[:690], reuse)
        assert reuse.selection is None
        seen = []
        for i in range(690, 700):
            out = sequence.extend(q[i : i + 1], k[i : i + 1], v[i : i + 1], reuse)
            seen.append(reuse.selection)
            assert reuse.selection is not None
            start = int(reuse.selection.window_start[0])
            keys, size = {*range(16), *range(start, i + 1)}, config.key_block_size
            for block in reuse.selection.indices[0, 0].tolist():
                keys |= set(range(block * size, block * size + size)) if block >= 0 else set()
            assert set(range(i - 31, i + 1)) <= keys
            expected = head_zero(q[i], k, v, sorted(keys))
            torch.testing.assert_close(out[0, 0], expected, atol=1e-5, rtol=1e-5)
    assert [len(list(same)) for _, same in groupby(seen, key=id)] == [4, 4, 2]


def head_zero(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: list[int]) -> torch.Tensor:
    weights = torch.softmax(k[keys, 0] @ q[0] / 8, dim=0)
    return weights @ v[keys, 0]


@every_backend
@pytest.mark.parametrize("query_len", [0, 1, 3])
def test_lse_and_empty_queries(backend: str, query_len: int) -> None:
    q, k, v = qkv(query_len, 50)
    with using(backend) as name:
        out, lse = hipserve.hip_attention(q, k, v, backend=name, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    if query_len == 1:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / 8
        torch.testing.assert_close(lse[0, 0], scores.logsumexp(-1)[0, :, 0])


@every_backend
def test_scale_and_softcap_are_applied_once(backend: str) -> None:
    q, k, v = qkv(5, 60)
    with using(backend) as name:
        out = hipserve.hip_attention(q, k, v, sm_scale=0.3, softcap=2.0, backend=name)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 0.3
    hidden = torch.ones(5, 60).tril(55) == 0
    weights = (2 * torch.tanh(scores / 2)).masked_fill(hidden, -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_compiled_equals_eager() -> None:
    """torch.compile sees custom operators, not their insides."""
    from hipserve.attention.hip import whole_sequences
    from hipserve.ops import build_index

    q, k, v = qkv(128, 900)
    config = HiPConfig(**SMALL)
    layout = whole_sequences(1, 128, 900, q.device)
    layout.query_blocks(64)
    keys = HeldKeys(KeyPool(k, v), build_index(k), layout)
    attention = AttentionLayer(config, rule_of(config, q[0], 2))

    def layer(q: torch.Tensor) -> torch.Tensor:
        return attention.forward(q * 2, keys)[0] + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q[0]), layer(q[0]))


@every_backend
@selectors
def test_decode_steps_equal_rows_of_prefill(backend: str, selector: str) -> None:
    """In pages, token by token, a selection for each: what one pass of single-row blocks gives."""
    q, k, v = (x[0] for x in qkv(660, 660))
    config = HiPConfig(
        selector=selector, query_block_size=1, query_stride=1, refresh_interval=1, **SMALL
    )
    with using(backend) as name:
        whole = Sequence(660, config, name, torch.float32).extend(q, k, v)
        grown, reuse = Sequence(660, config, name, torch.float32), SelectionReuse()
        grown.extend(q[:640], k[:640], v[:640], reuse)
        steps = [
            grown.extend(q[i : i + 1], k[i : i + 1], v[i : i + 1], reuse) for i in range(640, 660)
        ]
    assert torch.equal(torch.cat(steps), whole[640:])


@every_backend
@selectors
@pytest.mark.parametrize("interval", [3, 40])
def test_no_key_falls_between_window_and_selection(
    backend: str, selector: str, interval: int
) -> None:
    """However long a selection serves: with room for every key at its time, all keys are read."""
    q, k, v = (x[0] for x in qkv(200, 200))
    room = {**SMALL, "budget": 128, "sliding_window": 16}
    config = HiPConfig(selector=selector, refresh_interval=interval, **room)
    with using(backend) as name:
        sequence, reuse = Sequence(200, config, name, torch.float32), SelectionReuse()
        sequence.extend(q[:120], k[:120], v[:120])
        for i in range(120, 160):
            out = sequence.extend(q[i : i + 1], k[i : i + 1], v[i : i + 1], reuse)
            if interval == 40:
                dense = head_zero(q[i], k, v, list(range(i + 1)))
                torch.testing.assert_close(out[0, 0], dense, atol=1e-5, rtol=1e-5)
            assert reuse.selection is not None
            start = int(reuse.selection.window_start[0])
            assert start <= i + 1 - 16
            blocks = reuse.selection.indices[0, 0]
            assert int(blocks.max()) < max(start // config.key_block_size, 1)
