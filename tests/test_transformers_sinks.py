"""Models with learned attention sinks equal eager transformers: every cache, padding, pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, PreTrainedModel

from hipserve import ArgumentError, HiPCache
from hipserve.attention import absorb_sinks
from hipserve.attention import layer as attention_layer
from hipserve.plan import dense_rows
from tiny_models import PRUNED, SIZES, logits_in_parts, prompts

FULL = {"layer_types": ["full_attention"] * 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "granite": ("GraniteSWAConfig", {"attention_multiplier": 0.3}),
}
models = pytest.mark.parametrize("name", MODELS)


def twins(name: str, hip: dict[str, Any] | None = None) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights under "hip" and eager; sinks large enough to matter.

    Windowed layers too, unless something is pruned: only full layers are, and all are compared.
    """
    torch.manual_seed(3)
    config_name, extra = MODELS[name]
    sizes = {**SIZES, **extra, "sliding_window": 24, **(FULL if hip else {})}
    config = getattr(transformers, config_name)(**sizes)
    if hip is not None:
        config.hip = hip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hip").float().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.randn(4) * 2)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return model, eager


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)


@models
def test_prefill_chunks_and_decode_equal_eager(name: str) -> None:
    model, eager = twins(name)
    ids = prompts(2, 100)
    edges = [0, 37, 64, 98, 99, 100]
    with torch.no_grad():
        expected = eager(ids).logits
        assert_close(model(ids, use_cache=False).logits, expected)
    assert_close(logits_in_parts(model, ids, [0, 100], HiPCache(model.config)), expected)
    assert_close(logits_in_parts(model, ids, edges, HiPCache(model.config)), expected)
    assert_close(
        logits_in_parts(model, ids, edges, transformers.DynamicCache(config=model.config)), expected
    )


@models
def test_left_padded_answers_equal_eager(name: str) -> None:
    model, eager = twins(name)
    ids = prompts(3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 17, 60)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = eager.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    cache = HiPCache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)


@torch.no_grad()
def test_pruned_rows_have_sinks_too() -> None:
    """Room for all middle keys, but searched; then less room: other keys, and still sinks."""
    room = {**PRUNED, "budget": 256}
    model, eager = twins("gpt_oss", room)
    ids = prompts(2, 300)
    expected = eager(ids).logits
    assert_close(model(ids, past_key_values=HiPCache(model.config)).logits, expected)
    model.config.hip = PRUNED
    pruned = logits_in_parts(model, ids, [0, 64, 288, 300], HiPCache(model.config))
    assert_close(pruned, model(ids, use_cache=False).logits)
    assert (pruned - expected).abs().max() > 0.1, "nothing was pruned"
    for layer in model.model.layers:
        layer.self_attn.sinks.fill_(-torch.inf)
    without = logits_in_parts(model, ids, [0, 64, 288, 300], HiPCache(model.config))
    assert (pruned - without)[:, 200:].abs().max() > 0.1, "pruned rows know no sinks"


@torch.no_grad()
def test_a_head_by_torch_has_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does with the first rows of a prompt, here with torch's kernels for CPUs."""
    model, _ = twins("gpt_oss", {**PRUNED, "dense_below": 100})
    ids = prompts(2, 150)
    expected = model(ids, past_key_values=HiPCache(model.config)).logits

    def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        rows, scale = dense_rows(options["rule"], q.shape[1]), options["sm_scale"]
        q, k, v = (x[:, :rows].transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        scores = q @ k.repeat_interleave(2, 1).mT * scale
        future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        lse = scores.masked_fill(future, -torch.inf).logsumexp(-1)
        sinks = options["sink_logits"]
        return absorb_sinks(out.transpose(1, 2), lse.transpose(1, 2), sinks)[0]

    monkeypatch.setattr(attention_layer, "dense_head", by_torch)
    assert_close(model(ids, past_key_values=HiPCache(model.config)).logits, expected)


def test_no_gradient_goes_through_sinks() -> None:
    model, _ = twins("gpt_oss")
    model.requires_grad_(False)
    model.model.layers[2].self_attn.sinks.requires_grad_()
    ids = prompts(1, 20)
    with pytest.raises(ArgumentError, match="no gradient through HiP attention"):
        model(ids, labels=ids).loss.backward()
