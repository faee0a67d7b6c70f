"""Which `HiPConfig` a model runs with: its own `config.hip`, or the one that was registered."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

from transformers import AttentionInterface

from hipserve.config import DEFAULT, HiPConfig
from hipserve.errors import ArgumentError
from hipserve.integrations.factors import with_own_factors

NAME = "hip"
_parsed: tuple[dict[str, Any], HiPConfig] = {}, DEFAULT


def config_of(model_config: Any) -> HiPConfig:
    """The HiPConfig of a model: its own, or the registered one; with its trained length, where that
    matters, and with its factors of the budget."""
    own = getattr(model_config, NAME, None)
    config = with_own_factors(registered() if own is None else _parse(own), model_config)
    if config.extend == "none" or config.trained_length is not None:
        return config
    return _trained_on(config, int(model_config.max_position_embeddings))


@functools.lru_cache(64)
def _trained_on(config: HiPConfig, trained_length: int) -> HiPConfig:
    return config.replace(trained_length=trained_length)


def registered() -> HiPConfig:
    """What `register` was given: it stands with the function in transformers' own table."""
    return getattr(AttentionInterface().get(NAME), "config", DEFAULT)


def _parse(settings: dict[str, Any]) -> HiPConfig:
    """Every layer asks at every step: settings equal to the last ones are not validated again."""
    global _parsed
    if not isinstance(cast("object", settings), dict):
        hint = 'write model.config.hip = {"budget": 2048}, or {"preset": "fast"}'
        raise ArgumentError("config.hip", "a dict of HiPConfig's fields", repr(settings), hint)
    if settings != _parsed[0]:
        _parsed = copy.deepcopy(dict(settings)), HiPConfig.from_dict(dict(settings))
    return _parsed[1]
