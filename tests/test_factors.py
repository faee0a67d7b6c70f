"""Factors of the budget that a model brings: transformers and vLLM read the heads by them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hipserve import ConfigError, HiPConfig
from hipserve.integrations.factors import with_own_factors
from hipserve.integrations.transformers import HiPCache
from hipserve.integrations.transformers.settings import config_of
from tiny_models import PRUNED, build, prompts

OWN = [[0.5, 2.0], [], [1.5]]
MODEL = SimpleNamespace(hip_budget_factors=OWN)


def test_a_configuration_leaves_its_factors_to_the_model() -> None:
    filled = with_own_factors(HiPConfig(), MODEL)
    assert filled.budget_factors == ((0.5, 2.0), (), (1.5,))
    assert with_own_factors(filled, SimpleNamespace(hip_budget_factors=[[1.0]])) is filled
    assert with_own_factors(HiPConfig(), SimpleNamespace()) == HiPConfig()


def test_a_configuration_may_say_that_all_heads_are_alike() -> None:
    alike = HiPConfig(budget_factors=[[]])
    assert with_own_factors(alike, MODEL) is alike


def test_searches_that_rank_no_keys_have_no_factors() -> None:
    for config in (HiPConfig(selector="tree"), HiPConfig(rerank=0)):
        assert with_own_factors(config, MODEL) is config


def test_bad_factors_of_a_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="hip_budget_factors: expected one list a layer") as error:
        with_own_factors(HiPConfig(), SimpleNamespace(hip_budget_factors=[[-1.0]]))
    assert "config.json" in error.value.hint


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ([[0.5, 2.0, 1.0]], "a factor for each of 2 KV heads, got 3 in layer 0"),
        ([[0.5, 2.0], [], [1.0] * 4], "a factor for each of 2 KV heads, got 4 in layer 2"),
        ([[1.0, 2.0]] * 2, "a list for each of 3 layers, got 2 lists"),
        ([[1.0, 2.0]] * 6, "a list for each of 3 layers, got 6 lists"),
    ],
)
def test_factors_of_other_models_are_refused_before_anything_is_pruned(
    lists: list[list[float]], expected: str
) -> None:
    shape = {"num_hidden_layers": 3, "num_key_value_heads": 2}
    config, model = HiPConfig(budget_factors=lists), SimpleNamespace(**shape)
    with pytest.raises(ConfigError, match=f"^budget_factors: expected {expected}"):
        with_own_factors(config, model)
    with pytest.raises(ConfigError, match=f"^hip_budget_factors: expected {expected}"):
        with_own_factors(HiPConfig(), SimpleNamespace(**shape, hip_budget_factors=lists))


def test_settings_are_checked_again_for_a_model_of_other_heads() -> None:
    config = HiPConfig(budget_factors=[[0.5, 2.0]])
    two, four = (
        SimpleNamespace(hip=config.to_dict(), max_position_embeddings=1, num_key_value_heads=n)
        for n in (2, 4)
    )
    assert config_of(two) == config
    with pytest.raises(ConfigError, match="a factor for each of 4 KV heads"):
        config_of(four)


def keys_read(own: Any) -> float:
    """Keys that the one row of a decode step reads, mean over KV heads, of all layers."""
    model = build("llama", {**PRUNED, "decode_dense_below": 0})
    if own is not None:
        model.config.hip_budget_factors = own
    cache = HiPCache(model.config)
    ids = prompts(length=400)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        before = cache.count_keys()[0]
        model(ids[:, -1:], past_key_values=cache)
    return cache.count_keys()[0] - before


def test_transformers_reads_heads_by_the_factors_of_the_model() -> None:
    constant = keys_read(None)
    assert keys_read([[1.0, 1.0], [], [1.0]]) == constant
    # 32 keys a head: 16 and 64 in layer 0, 48 in both heads of layer 2.
    assert keys_read(OWN) == constant + ((16 + 64) / 2 - 32) + 0 + (48 - 32)


def test_the_settings_of_a_model_keep_its_factors() -> None:
    model = build("llama", {"budget": 2048})
    model.config.hip_budget_factors = OWN
    assert config_of(model.config).of_layer(0).head_blocks(2) == (64, 256)
    model.config.hip = {"budget": 2048, "budget_factors": [[]]}
    assert config_of(model.config).of_layer(0).head_blocks(2) == (128, 128)


@pytest.mark.parametrize(
    ("total", "size", "here", "expected"),
    [
        (8, 1, 8, [slice(0, 8)]),
        (8, 2, 4, [slice(0, 4), slice(4, 8)]),
        (2, 4, 1, [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]),
    ],
)
def test_workers_of_vllm_take_the_factors_of_their_heads(
    total: int, size: int, here: int, expected: list[slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    from hipserve.integrations.vllm import layer

    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total),
        parallel_config=SimpleNamespace(tensor_parallel_size=size),
    )
    found = []
    for rank in range(size):
        monkeypatch.setattr(layer, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        found.append(layer.heads_here(config, here))
    assert found == expected
