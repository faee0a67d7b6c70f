"""Which models reach beyond their trained length, and the parameters of YaRN; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from hipserve.errors import ArgumentError

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


def text_config(table: Mapping[str, Any]) -> SimpleNamespace:
    """The text configuration as transformers makes it of a config.json, whose older form has
    `rope_theta` and `rope_scaling` instead of `rope_parameters`."""
    text = table.get("text_config")
    fields: dict[str, Any] = {**table, **text} if isinstance(text, dict) else dict(table)
    scaling: dict[str, Any] = dict(fields.get("rope_scaling") or {})
    older = {"rope_theta": fields.get("rope_theta", 10_000.0), **scaling}
    older["rope_type"] = scaling.get("rope_type", older.pop("type", "default"))
    fields["rope_parameters"] = fields.get("rope_parameters") or older
    fields.setdefault("model_type", "unknown")
    return SimpleNamespace(**fields)
