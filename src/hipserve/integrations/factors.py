"""Factors of the budget that a model brings: what was measured of its heads, in its config.json."""

from __future__ import annotations

from typing import Any

from hipserve.config import HiPConfig

NAME = "hip_budget_factors"
"""The entry of config.json: lists as in `HiPConfig.budget_factors`."""


def with_own_factors(config: HiPConfig, model_config: Any) -> HiPConfig:
    """`config`, with the factors of the model where it leaves them to the model.

    Raises:
        ConfigError: the model's entry is no list of lists of factors.
    """
    own = getattr(model_config, NAME, None)
    if own is None or config.budget_factors or not config.ranks_keys:
        return config
    return config.replace(budget_factors=own)
