"""Budgets of heads: factors of the budget in a configuration, and what each head reads then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends import every_backend, using
from hipserve import HiPConfig, hip_attention
from hipserve.errors import ConfigError
from hipserve.ops import block_sparse_attention, select_blocks
from hipserve.testing.cases import Shape, make_case
from hipserve.testing.oracle import assert_as_exact, readable

BASE = HiPConfig(
    budget=128,
    rerank=4,
    query_block_size=16,
    key_block_size=16,
    num_sink_tokens=16,
    sliding_window=32,
    dense_below=0,
    decode_dense_below=0,
)
SHAPE = Shape((900, 700), (70, 1), num_kv_heads=3, page_size=256, kind="grid")


def chosen(config: HiPConfig, backend: str) -> list[list[set[int]]]:
    """The blocks of every query block and head."""
    case = make_case(SHAPE, config.index_form)
    with using(backend) as name:
        found = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
    lists = found.indices.tolist()
    return [[{b for b in head if b >= 0} for head in block] for block in lists]


@every_backend
def test_each_head_reads_its_own_number_of_the_same_candidates(backend: str) -> None:
    """One search serves them all, so a smaller budget chooses among what a larger one chooses."""
    equal = chosen(BASE, backend)
    varied = chosen(BASE.replace(budget_factors=[[0.25, 1, 2.5]]), backend)
    for few, constant in zip(varied, equal, strict=True):
        assert [len(head) for head in constant] == [8, 8, 8]
        assert [len(head) for head in few] == [2, 8, 20]
        assert few[0] < constant[0]
        assert few[1] == constant[1]
        assert constant[2] < few[2]


@every_backend
def test_heads_of_a_group_share_the_budget_of_their_keys(backend: str) -> None:
    config = BASE.replace(share_group=False, budget_factors=[[0.25, 1, 2.5]])
    for block in chosen(config, backend):
        assert [len(head) for head in block[:4]] == [2, 2, 8, 8]


def test_attention_is_exact_over_what_each_head_chose() -> None:
    config = BASE.replace(budget_factors=[[0.125, 1, 4]])
    case = make_case(SHAPE, config.index_form)
    found = select_blocks(case.q, case.index, case.layout, config=config)
    out, lse = block_sparse_attention(case.q, case.pool, case.layout, found, config=config)
    assert_as_exact(out, lse, case, readable(case, found, config))


def test_a_layer_has_its_own_factors() -> None:
    config = HiPConfig(budget_factors=[[0.25, 2.5], [], [3], [0.001, 1000]])
    blocks = [config.of_layer(i).head_blocks(2) for i in range(4)]
    assert blocks == [(16, 160), (64, 64), (192, 192), (1, 256)]
    assert {config.of_layer(i).max_selected for i in range(4)} == {256}
    assert config.of_layer(0, slice(1, 2)).head_blocks(1) == (160,)
    assert HiPConfig(budget_factors=[[0.5]]).of_layer(7).head_blocks(2) == (32, 32)


def test_no_factors_and_an_empty_list_mean_one() -> None:
    for config in (HiPConfig(), HiPConfig(budget_factors=[[]], selector="tree")):
        assert config.of_layer(3) is config
        assert config.head_blocks(2) == (64, 64)
        assert config.max_selected == 64


def test_factors_survive_being_written_down() -> None:
    config = HiPConfig(budget_factors=[[0.25, 2.5], []])
    for form in ("toml", "json"):
        assert HiPConfig.loads(config.dumps(form), form) == config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"budget_factors": 0.5}, "one list a layer"),
        ({"budget_factors": [[0]]}, "above 0"),
        ({"budget_factors": [[float("nan")]]}, "above 0"),
        ({"budget_factors": [[True]]}, "above 0"),
        ({"budget_factors": [[1]], "selector": "tree"}, 'selector="bound"'),
        ({"budget_factors": [[1]], "rerank": 0}, "rerank of 1 or more"),
    ],
)
def test_bad_factors_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        HiPConfig.from_dict(values)


def test_factors_of_another_model_are_refused() -> None:
    config = BASE.replace(budget_factors=[[1, 1], [1, 1]])
    with pytest.raises(ConfigError, match="a list for each layer, 3 or more"):
        config.of_layer(2)
    q = torch.randn(1, 600, 6, 64)
    k = torch.randn(1, 600, 3, 64)
    with pytest.raises(ConfigError, match=r"config\.of_layer"):
        hip_attention(q, k, k, config=config)
    with pytest.raises(ConfigError, match="each of 3 KV heads"):
        hip_attention(q, k, k, config=config.of_layer(0))
