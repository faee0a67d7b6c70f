"""Random models of a few layers in the shape of well-known families, made in a moment."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from hipserve.models import bundled_path

SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEADS: dict[str, Any] = {**SIZES, "head_dim": 32}
FULL, WINDOW, LINEAR = "full_attention", "sliding_attention", "linear_attention"
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LINEAR_HEADS: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def granite() -> Any:
    """Passes `sinks=None` to every layer."""
    return transformers.GraniteConfig(**SIZES, num_hidden_layers=3)


def llama4() -> Any:
    """Three layers of four read chunks of 256 tokens."""
    sizes = {**HEADS, "intermediate_size": 64, "intermediate_size_mlp": 256}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    return transformers.Llama4TextConfig(
        **sizes, **experts, num_hidden_layers=4, attention_chunk_size=256
    )


def gemma3n() -> Any:
    """The last two of six layers read the pages of earlier ones."""
    sizes = {**HEADS, "intermediate_size": [256] * 6, "activation_sparsity_pattern": [0.0] * 6}
    return transformers.Gemma3nTextConfig(
        **sizes,
        vocab_size_per_layer_input=SIZES["vocab_size"],
        hidden_size_per_layer_input=32,
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        sliding_window=128,
        laurel_rank=16,
        layer_types=[WINDOW, FULL] * 3,
    )


def gemma2() -> Any:
    """Scores capped softly, and windows in every second layer."""
    return transformers.Gemma2Config(**HEADS, num_hidden_layers=4, sliding_window=128)


def gemma3() -> Any:
    """One full layer among windows."""
    return transformers.Gemma3TextConfig(
        **HEADS, num_hidden_layers=4, sliding_window=128, layer_types=[WINDOW] * 3 + [FULL]
    )


def mistral() -> Any:
    """A window in every layer."""
    return transformers.MistralConfig(**HEADS, num_hidden_layers=3, sliding_window=128)


def qwen3next() -> Any:
    """Recurrent states whose blocks are as large as those of the two full layers."""
    return transformers.Qwen3NextConfig(
        **{**HEADS, "num_key_value_heads": 4},
        **{**LINEAR_HEADS, "linear_num_value_heads": 1, "linear_num_key_heads": 1},
        **EXPERTS,
        shared_expert_intermediate_size=64,
        num_hidden_layers=4,
        layer_types=[LINEAR, FULL] * 2,
    )


def qwen3next_wide() -> Any:
    """Recurrent states that are as large as 1,152 tokens of the only full layer."""
    return transformers.Qwen3NextConfig(
        **HEADS,
        **LINEAR_HEADS,
        **EXPERTS,
        shared_expert_intermediate_size=64,
        num_hidden_layers=4,
        layer_types=[LINEAR] * 3 + [FULL],
    )


MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_chunk_size": 64,
}


def granite_hybrid() -> Any:
    """Granite 4 H: three Mamba layers and one full layer without positions, experts in each."""
    return transformers.GraniteMoeHybridConfig(
        **{**SIZES, "intermediate_size": 64},
        **MAMBA,
        mamba_expand=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
        num_hidden_layers=4,
        layer_types=["mamba"] * 3 + ["attention"],
    )


def falcon_h1() -> Any:
    """Mamba and full attention beside each other in every layer."""
    return transformers.FalconH1Config(**HEADS, **MAMBA, mamba_d_ssm=256, num_hidden_layers=3)


def gptoss() -> Any:
    """Learned sinks, and windows in every second layer."""
    sizes = {**HEADS, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.GptOssConfig(
        **sizes,
        num_hidden_layers=4,
        sliding_window=128,
        initial_context_length=4096,
        rope_scaling=None,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (
        *(granite, llama4, gemma3n, gptoss, gemma2, gemma3, mistral),
        *(qwen3next, qwen3next_wide, granite_hybrid, falcon_h1),
    )
}


def make(name: str, folder: Path) -> str:
    """A checkpoint in float32, with the bundled model's tokenizer; its path."""
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.normal_(0, 0.08)
        model.save_pretrained(path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled_path() / file, path)
    return str(path)
