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
from hipserve.integrations.extend import check_rope
from hipserve.ops.rope import pack_rope


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
