"""Which `HiPConfig` a model runs with: its own `config.hip`, or the one that was registered."""

from __future__ import annotations

import copy
from typing import Any, cast

from transformers import AttentionInterface

from hipserve.config import DEFAULT, HiPConfig
from hipserve.errors import ArgumentError
from hipserve.integrations import factors

NAME = "hip"
_READ = (NAME, factors.NAME, *factors.SHAPE, "max_position_embeddings")
_last: tuple[HiPConfig, list[Any], HiPConfig] = DEFAULT, [], DEFAULT


def config_of(model_config: Any) -> HiPConfig:
    """The HiPConfig of a model: its own, or the registered one; with its trained length, where that
    matters, and with its factors of the budget.

    Every layer asks in every step: settings equal to the last ones are not validated again.
    """
    global _last
    given = registered()
    own = [getattr(model_config, name, None) for name in _READ]
    if given is not _last[0] or own != _last[1]:
        _last = given, copy.deepcopy(own), _made(given, model_config)
    return _last[2]


def _made(given: HiPConfig, model_config: Any) -> HiPConfig:
    own = getattr(model_config, NAME, None)
    config = factors.with_own_factors(given if own is None else _parse(own), model_config)
    if config.extend == "none" or config.trained_length is not None:
        return config
    return config.replace(trained_length=int(model_config.max_position_embeddings))


def registered() -> HiPConfig:
    """The configuration that `register` was given; transformers' table has it with the function."""
    return getattr(AttentionInterface().get(NAME), "config", DEFAULT)


def _parse(settings: dict[str, Any]) -> HiPConfig:
    if not isinstance(cast("object", settings), dict):
        hint = 'write model.config.hip = {"budget": 2048}, or {"preset": "fast"}'
        raise ArgumentError("config.hip", "a dict of HiPConfig's fields", repr(settings), hint)
    return HiPConfig.from_dict(dict(settings))
