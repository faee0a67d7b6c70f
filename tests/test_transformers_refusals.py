"""Models that "hip" cannot serve say so in a sentence; odd ones that it can equal sdpa."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hipserve import ArgumentError, HiPCache
from hipserve.integrations.transformers import check_model
from hipserve.integrations.transformers.forward import hip_forward
from hipserve.models import load
from tiny_models import SIZES, build, logits_in_parts, prompts

THROUGH = "one whose attention goes through transformers' AttentionInterface"
OWN = ("Falcon", "Bloom", "Mpt", "GPTJ")
LATENT = ("DeepseekV2", "DeepseekV3")


def config_of(name: str) -> Any:
    return getattr(transformers, f"{name}Config")()


@pytest.mark.parametrize("name", [*OWN, *LATENT])
def test_models_of_another_attention_are_refused_before_weights(name: str, tmp_path: Path) -> None:
    config_of(name).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=THROUGH) as refusal:
        load(str(tmp_path))  # there are no weights in it
    assert f"{name}ForCausalLM, which" in str(refusal.value)
    assert "choose a Llama, Qwen, Mistral" in str(refusal.value)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mistral", "Gemma3Text", "GptOss", "Phi3"])
def test_models_that_work_are_not(name: str) -> None:
    config = config_of(name)
    check_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


@torch.no_grad()
def test_a_model_that_computes_with_masks_says_so() -> None:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hip")
    with pytest.raises(
        ArgumentError, match='attn_implementation: expected for "hip" a model whose'
    ):
        model(prompts(), past_key_values=DynamicCache())
    with pytest.raises(ArgumentError, match="computes with its keys itself"):
        model(prompts(), past_key_values=HiPCache(config))


def test_what_would_change_scores_is_refused() -> None:
    module = build("llama").model.layers[0].self_attn
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    with pytest.raises(ArgumentError, match="position_bias: expected none in LlamaAttention"):
        hip_forward(module, q, k, k, None, position_bias=torch.zeros(1, 4, 9, 9))
    with pytest.raises(ArgumentError, match=r"value: expected keys and values of one head_dim"):
        hip_forward(module, q, k, k[..., :8], None)
    with pytest.raises(ArgumentError, match="value_states: expected the shape of the keys"):
        HiPCache(module.config).layers[0].update(k, k[..., :8])


def test_weights_that_are_not_returned_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        out = build("llama")(prompts(), output_attentions=True)
    assert not out.attentions
    assert "`hip` attention does not support `output_attentions=True`" in caplog.text


@torch.no_grad()
def test_layers_of_unequal_head_dim_equal_sdpa() -> None:
    """Gemma 4: windowed layers of one head_dim, global ones of 512."""
    torch.manual_seed(3)
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {**SIZES, "num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 24}
    sizes |= {"global_head_dim": 512, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    config = transformers.Gemma4TextConfig(**sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hip").float().eval()
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("sdpa")
    ids = prompts(2, 100)
    expected = dense(ids).logits
    for edges in ([0, 100], [0, 64, 99, 100]):
        got = logits_in_parts(model, ids, edges, HiPCache(config))
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)


def test_importing_changes_nothing_in_transformers() -> None:
    program = (
        "from hipserve import HiPCache, register\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "known = lambda: ['hip' in x().valid_keys() for x in (AttentionInterface, "
        "AttentionMaskInterface)]\n"
        "assert known() == [False, False]\n"
        "register()\n"
        "assert known() == [True, True]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
