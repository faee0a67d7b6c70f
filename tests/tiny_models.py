"""Tiny random models of many families, and prompts for them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import hipserve

hipserve.register()

PRUNED = {
    "budget": 32,
    "num_sink_tokens": 16,
    "sliding_window": 16,
    "query_block_size": 16,
    "dense_below": 0,
    "refresh_interval": 1,
}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral windowed": ("MistralConfig", {"sliding_window": 24}),
    "gemma2": ("Gemma2Config", {"sliding_window": 24, "attn_logit_softcapping": 20.0}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 24}),
}


def build(
    family: str, hip: dict[str, Any] | None = None, attention: str = "hip"
) -> PreTrainedModel:
    torch.manual_seed(3)
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **extra})
    if hip is not None:
        config.hip = hip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval()


def twins(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights under "hip" with room for everything, and under "sdpa" (or eager)."""
    model = build(family)
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    return model, dense


def prompts(batch: int = 1, length: int = 90) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(5))


def logits_in_parts(model: PreTrainedModel, ids: torch.Tensor, edges: list[int], cache: Any):
    with torch.no_grad():
        parts = [
            model(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(edges)
        ]
    return torch.cat(parts, dim=1)
