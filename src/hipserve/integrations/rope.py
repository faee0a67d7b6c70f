"""How a model turns its keys by their position: read from its configuration and its own code.

transformers' classes of a model say it: its rotary embedding has the frequencies, scaled or not,
and `apply_rotary_pos_emb` the pairs of channels, in halves or neighbours, all of them or some. Unit
vectors are turned by it, and what becomes of them is read off.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from hipserve.errors import ArgumentError
from hipserve.ops.rope import pack_rope

FAMILIES = (
    *("cohere", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_oss", "granite"),
    *("granitemoe", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe"),
    *("qwen3", "qwen3_moe", "stablelm", "starcoder2"),
)
"""Model types that turn queries and keys of all full-attention layers by `apply_rotary_pos_emb`.
Others have layers without positions (NoPE), positions in several axes, or biases (ALiBi)."""

STEADY = ("default", "linear", "llama3", "yarn")
"""Scalings whose frequencies are the same at every length."""


def check_rope(config: Any, extend: str) -> dict[str, Any]:
    """The rotary parameters of a model's text configuration, of its full-attention layers.

    Raises:
        ArgumentError: `extend` cannot be done to this model.
    """
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    kind = parameters.get("rope_type", "none")
    got = ""
    if config.model_type not in FAMILIES:
        got = f"model type {config.model_type}"
    elif "mrope_section" in parameters:
        got = "positions of several axes (M-RoPE)"
    elif extend == "stream" and kind not in STEADY:
        got = f'rope_type "{kind}", which changes with the length'
    elif extend == "yarn" and kind not in ("default", "yarn"):
        got = f'rope_type "{kind}"'
    if got:
        other = 'use extend="stream"' if extend == "yarn" and kind in STEADY else "leave extend out"
        expected = f'a model of known rotary positions for "{extend}"'
        raise ArgumentError("extend", expected, got, f"{other} (docs/extend.md)")
    return parameters


def yarn_parameters(config: Any, factor: float) -> dict[str, Any]:
    """Rotary parameters that reach `factor` times as far (YaRN, arXiv 2309.00071).

    >>> settings = AutoConfig.from_pretrained(path)  # doctest: +SKIP
    >>> settings.rope_parameters = yarn_parameters(settings, 4.0)  # doctest: +SKIP

    Args:
        config: the model's text configuration, whose positions are not scaled yet.

    Returns:
        what `config.rope_parameters` and vLLM's `--hf-overrides` take.

    Raises:
        ArgumentError: this model's positions are scaled already, or not known to be rotary.
    """
    parameters = check_rope(config, "yarn")
    if parameters.get("rope_type") == "yarn":
        hint = 'its context is long already; use extend="stream" beyond it'
        raise ArgumentError("extend", "a model without YaRN", "one with it", hint)
    return {
        **parameters,
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def read_rope(config: Any, head_dim: int) -> Tensor:
    """`[2, head_dim]` int32 of the full-attention layers, as `hipserve.ops.rope.turn` takes it.

    Args:
        config: the model's text configuration.

    Raises:
        ArgumentError: the model has no such positions, or it is not known how it turns keys.
    """
    check_rope(config, "stream")
    modeling = importlib.import_module(
        type(config).__module__.replace("configuration_", "modeling_")
    )
    names = [n for n in vars(modeling) if n.endswith("RotaryEmbedding") and "Vision" not in n]
    nested = "full_attention" in config.rope_parameters
    layer_type = {"layer_type": "full_attention"} if nested else {}
    with torch.device("cpu"):
        rotary = getattr(modeling, names[0])(config)
        cos, sin = rotary(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.long), **layer_type)
        turned = _turned_units(modeling.apply_rotary_pos_emb, cos, sin, head_dim)
    prefix = "full_attention_" if nested else ""
    return _read_off(turned, _frequencies(config, rotary, prefix), head_dim)


def _turned_units(apply: Any, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """`[n, n]`: what becomes of each unit vector of a head's n first channels a position later."""
    for width in (head_dim, cos.shape[-1]):  # some models cut the other channels off themselves
        units = torch.eye(width)[None, :, None]
        try:
            return apply(units, units, cos, sin)[0][0, :, 0].double()
        except RuntimeError:
            continue
    raise ArgumentError("extend", "rotary positions of a head", f"{cos.shape[-1]} channels")


def _frequencies(config: Any, rotary: Any, prefix: str) -> tuple[Tensor, Tensor]:
    """Those that the unit vectors were turned by, and those that the model has: a GGUF file may
    keep others (`hipserve.models.gguf`)."""
    own: Tensor = getattr(rotary, f"{prefix}inv_freq").double()
    kept = getattr(config, "hip_frequencies", None)
    return own, own if kept is None else torch.tensor(kept, dtype=torch.float64)


def _read_off(turned: Tensor, frequencies: tuple[Tensor, Tensor], head_dim: int) -> Tensor:
    """Pairs and frequencies from turned unit vectors `[n, n]`; angles as exact as frequencies."""
    channel = torch.arange(head_dim)
    partner, radians = channel.clone(), torch.zeros(head_dim, dtype=torch.float64)
    others = turned - torch.diag(turned.diag())
    size, found = others.abs().max(0)
    n = len(turned)
    partner[:n] = torch.where(size > 0, found, channel[:n])
    angle = torch.atan2(others[partner[:n], channel[:n]], turned.diag())
    seen, own = frequencies
    nearest = (angle.abs()[:, None] - seen).abs().argmin(1)
    radians[:n] = torch.where(size > 0, own[nearest] * angle.sign(), 0.0)
    return pack_rope(partner, radians)
