"""Factors of the budget that a model brings: what was measured of its heads, in its config.json."""

from __future__ import annotations

from typing import Any

from hipserve.config import HiPConfig
from hipserve.errors import ConfigError

NAME = "hip_budget_factors"
"""The entry of config.json: lists as in `HiPConfig.budget_factors`."""
SHAPE = ("num_hidden_layers", "num_key_value_heads", "num_global_key_value_heads")
"""The entries of config.json that say how many factors a model needs."""


def with_own_factors(config: HiPConfig, model_config: Any) -> HiPConfig:
    """`config`, with the factors of the model where it leaves them to the model.

    Raises:
        ConfigError: the model's entry is no list of lists of factors, or the factors are those of
            a model with other layers or heads.
    """
    own = getattr(model_config, NAME, None)
    if own is None or config.budget_factors or not config.ranks_keys:
        _check_shape(config, model_config)
        return config
    try:
        config = config.replace(budget_factors=own)
        _check_shape(config, model_config)
    except ConfigError as error:
        hint = "correct it in the model's config.json; budget_factors = [[]] leaves it out"
        raise ConfigError(NAME, error.expected, error.got, hint) from None
    return config


def _check_shape(config: HiPConfig, model_config: Any) -> None:
    """Refuses factors of another model at once, not in the first step that prunes."""
    lists, hint = config.budget_factors, "hipserve lab budgets measures those of a model"
    layers, *heads = (getattr(model_config, name, None) for name in SHAPE)
    if isinstance(layers, int) and len(lists) not in (0, 1, layers):
        expected = f"a list for each of {layers} layers"
        raise ConfigError("budget_factors", expected, f"{len(lists)} lists", hint)
    if not isinstance(heads[0], int):
        return
    for layer, one in enumerate(lists):
        if len(one) not in (0, 1, *heads):
            expected = f"a factor for each of {heads[0]} KV heads"
            raise ConfigError("budget_factors", expected, f"{len(one)} in layer {layer}", hint)
