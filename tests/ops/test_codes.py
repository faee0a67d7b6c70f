"""Search through codes of keys: every tier chooses what the definition does, index for index."""

from __future__ import annotations

import random

import pytest
import torch

from backends import every_tier, using
from hipserve.config import HiPConfig
from hipserve.ops import select_blocks
from hipserve.testing.cases import Case, Shape, make_case, random_config, random_shape

CODED = HiPConfig(budget=64, sliding_window=33, num_sink_tokens=16, query_stride=2, dense_below=0)


def check(case: Case, config: HiPConfig, tier: str) -> None:
    given = (case.q, case.index, case.layout)
    with using(f"cpu:{tier}"):
        got = select_blocks(*given, config=config, backend="cpu")
    expected = select_blocks(*given, config=config, backend="reference")
    assert torch.equal(got.indices, expected.indices)


@every_tier
@pytest.mark.parametrize("code_bits", [4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_search_equals_the_definition(tier: str, code_bits: int, head_dim: int) -> None:
    """Single rows and whole query blocks, of few heads in a group and of many."""
    for group_size, rows in ((1, 1), (8, 1), (3, 2), (4, 70)):
        dtype = random.Random(group_size + rows).choice([torch.bfloat16, torch.float32])
        shape = Shape(
            (700, 333),
            (rows, 1),
            group_size=group_size,
            head_dim=head_dim,
            page_size=256,
            dtype=dtype,
            seed=rows,
        )
        coded = CODED.replace(code_bits=code_bits)
        case = make_case(shape, coded.index_form)
        for rerank in (0, 2):
            check(case, coded.replace(rerank=rerank), tier)


@every_tier
@pytest.mark.parametrize("seed", range(8))
def test_search_of_awkward_batches_equals_the_definition(tier: str, seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng, (torch.float32, torch.bfloat16, torch.float16))
    config = random_config(rng, shape.page_size, shape.num_kv_heads).replace(
        code_bits=rng.choice([4, 8])
    )
    check(make_case(shape, config.index_form), config, tier)


@every_tier
@pytest.mark.parametrize("relative_scores", [False, True])
def test_long_search_equals_the_definition(tier: str, relative_scores: bool) -> None:
    """More candidates than a batch of rows, on both levels; dimensions of the widest heads."""
    for head_dim, code_bits in ((512, 4), (16, 8)):
        shape = Shape((5000,), (9,), num_kv_heads=1, head_dim=head_dim, page_size=256)
        config = CODED.replace(
            budget=512,
            rerank=4,
            code_bits=code_bits,
            relative_scores=relative_scores,
        )
        check(make_case(shape, config.index_form), config, tier)
