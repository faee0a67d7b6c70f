"""Attention over given blocks is exact: every backend, every tier, against float64."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends import every_backend, using
from hipserve import HiPConfig
from hipserve.ops import block_sparse_attention, select_blocks
from hipserve.plan import pruning_rule
from hipserve.testing.cases import Case, Shape, in_pages, make_case, random_config, random_shape
from hipserve.testing.oracle import assert_as_exact, readable
from hipserve.types import BlockSelection

SEEDS = st.integers(0, 2**31 - 1)
HALF = (torch.float32, torch.bfloat16, torch.float16)


def random_selection(case: Case, config: HiPConfig, rng: random.Random) -> BlockSelection:
    """Any blocks of the middle, not only those a search would choose."""
    blocks = case.layout.query_blocks(config.query_block_size)
    heads = case.kv.pool.num_kv_heads if config.share_group else case.q.shape[1]
    indices = torch.full((blocks.shape[0], heads, config.max_selected), -1, dtype=torch.int32)
    starts = torch.empty(blocks.shape[0], dtype=torch.int32)
    for i, (_, _, rows, position) in enumerate(blocks.tolist()):
        starts[i] = pruning_rule(config, "cpu").window_start(position, rows)
        middle = range(
            config.num_sink_tokens // config.key_block_size, int(starts[i]) // config.key_block_size
        )
        for head in range(heads):
            count = rng.randint(0, min(len(middle), config.max_selected))
            chosen = sorted(rng.sample(middle, count))
            indices[i, head, :count] = torch.tensor(chosen, dtype=torch.int32)
    return BlockSelection(indices, starts)


@every_backend
@given(seed=SEEDS)
def test_sparse_is_exact(backend: str, seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng, HALF)
    config = random_config(rng, shape.page_size, shape.num_kv_heads)
    case = make_case(shape, config.index_form)
    selection = random_selection(case, config, rng)
    with using(backend) as name:
        out, lse = block_sparse_attention(
            case.q,
            case.pool,
            case.layout,
            selection,
            config=config,
            softcap=shape.softcap,
            backend=name,
        )
    assert_as_exact(out, lse, case, readable(case, selection, config))


@every_backend
def test_a_selection_may_be_a_view(backend: str) -> None:
    case = make_case(Shape((400,), (64,)))
    config = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32, dense_below=0)
    with using(backend) as name:
        whole = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
        few = [whole.indices[..., :2], whole.indices[..., :2].clone()]
        outs = [
            block_sparse_attention(
                case.q,
                case.pool,
                case.layout,
                BlockSelection(indices, whole.window_start),
                config=config,
                backend=name,
            )[0]
            for indices in few
        ]
    assert torch.equal(*outs)


@every_backend
@given(seed=SEEDS)
def test_dense_and_windowed_are_exact(backend: str, seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng, HALF)
    case, window = make_case(shape), rng.choice([0, 1, 7, 64, 300])
    config = HiPConfig(query_block_size=rng.choice([1, 32, 64]), query_stride=1)
    with using(backend) as name:
        out, lse = block_sparse_attention(
            case.q,
            case.pool,
            case.layout,
            config=config,
            sliding_window=window,
            softcap=shape.softcap,
            backend=name,
        )
    assert_as_exact(out, lse, case, readable(case, None, config, window))


@every_backend
def test_pages_and_strides_change_nothing_bit_for_bit(backend: str) -> None:
    shape = Shape((900, 130), (900, 1), dtype=torch.bfloat16, page_size=16, head_dim=128)
    config = HiPConfig(budget=128, sliding_window=64, num_sink_tokens=16, dense_below=0)
    case = make_case(shape)
    with using(backend) as name:

        def run(kv, layout, q):
            selection = select_blocks(q, kv.index, layout, config=config, backend=name)
            return block_sparse_attention(
                q, kv.pool, layout, selection, config=config, backend=name
            )

        out, lse = run(case.kv, case.layout, case.q)
        wide = torch.zeros(case.q.shape[0], 9, 128, dtype=torch.bfloat16)
        wide[:, 3:7] = case.q
        for page_seed in (1, 2):
            kv, layout = in_pages(case.ks, case.vs, shape, page_seed=page_seed)
            again, lse_again = run(kv, layout, wide[:, 3:7])
            assert torch.equal(out, again)
            assert torch.equal(lse, lse_again)


@every_backend
def test_runs_are_deterministic(backend: str) -> None:
    case = make_case(Shape((2000,), (300,), dtype=torch.bfloat16))
    config = HiPConfig(budget=128, sliding_window=64, num_sink_tokens=16, dense_below=0)
    threads = torch.get_num_threads()
    with using(backend) as name:
        selection = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
        results = []
        for run in range(10 if name == "reference" else 100):
            torch.set_num_threads(1 + run % 2)
            results.append(
                block_sparse_attention(
                    case.q, case.kv.pool, case.layout, selection, config=config, backend=name
                )[0]
            )
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17])
@every_backend
def test_few_rows_over_many_keys(backend: str, rows: int) -> None:
    """Decode splits long key lists and merges the parts by their lse."""
    shape = Shape((5000, 40), (rows, 1), num_kv_heads=1, group_size=4, page_size=256)
    case = make_case(shape)
    with using(backend) as name:
        out, lse = block_sparse_attention(case.q, case.pool, case.layout, backend=name)
    assert_as_exact(out, lse, case, readable(case, None, HiPConfig()))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [272, 320, 512])
@every_backend
def test_wide_heads(backend: str, head_dim: int, dtype: torch.dtype) -> None:
    """The global layers of some models have heads of 512: prefill, decode, dense and pruned."""
    shape = Shape((700, 65, 300), (130, 65, 1), head_dim=head_dim, dtype=dtype, page_size=16)
    case = make_case(shape)
    config = HiPConfig(budget=64, sliding_window=16, num_sink_tokens=16, dense_below=0)
    with using(backend) as name:
        chosen = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
        for selection in (None, chosen):
            out, lse = block_sparse_attention(
                case.q, case.kv.pool, case.layout, selection, config=config, backend=name
            )
            assert_as_exact(out, lse, case, readable(case, selection, config))
