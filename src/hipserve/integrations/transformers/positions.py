"""Positions beyond the trained length, in transformers: YaRN, and what a layer streams by."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hipserve.config import HiPConfig
from hipserve.integrations.extend import check_rope, yarn_parameters
from hipserve.integrations.rope import read_rope

_ropes: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
_own: WeakKeyDictionary[nn.Module, tuple[dict[str, Any], dict[str, nn.Module]]]
_own = WeakKeyDictionary()
"""The original rotary parameters and modules of models whose positions are scaled now."""


def rope_of(module: nn.Module, config: HiPConfig, head_dim: int, device: Any) -> Tensor | None:
    """`[2, head_dim]` of an attention layer whose configuration streams; None of any other.

    Raises:
        ArgumentError: it is not known how the model turns its keys.
    """
    if not config.streams:
        return None
    if module not in _ropes:
        _ropes[module] = read_rope(module.config, head_dim).to(device)
    return _ropes[module]


def extend_positions(model: nn.Module, config: HiPConfig | None) -> None:
    """Scales the model's positions by YaRN where `config.extend` says so, else makes them its own.

    Raises:
        ArgumentError: `config.extend` cannot be done to this model.
    """
    settings: Any = model.config
    settings = settings.get_text_config(decoder=True)
    if model in _own:
        settings.rope_parameters, modules = _own.pop(model)
        _replace(model, modules)
    if config is None or config.extend == "none":
        return
    check_rope(settings, config.extend)
    if config.extend == "yarn":
        scaled = yarn_parameters(settings, config.extend_factor)
        rotary = {
            n: m for n, m in model.named_modules() if type(m).__name__.endswith("RotaryEmbedding")
        }
        _own[model] = settings.rope_parameters, rotary
        settings.rope_parameters = scaled
        made: dict[str, Any] = {name: type(module) for name, module in rotary.items()}
        device = next(model.parameters()).device
        _replace(model, {name: make(settings).to(device) for name, make in made.items()})


def _replace(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)
