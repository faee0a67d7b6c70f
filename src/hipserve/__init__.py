"""Hierarchically pruned attention for serving long contexts: faster, without training."""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, BackendError, ConfigError, FitError, HipserveError
from hipserve.lazy import loader as _loader
from hipserve.offload import Offload

if TYPE_CHECKING:
    from hipserve.attention.hip import hip_attention
    from hipserve.integrations.transformers import HiPCache, capture_decode, register

__version__ = _version("hipserve")
__all__ = [
    "ArgumentError",
    "BackendError",
    "ConfigError",
    "FitError",
    "HiPCache",
    "HiPConfig",
    "HipserveError",
    "Offload",
    "capture_decode",
    "hip_attention",
    "register",
]

__getattr__ = _loader(
    __name__,
    {
        "hip_attention": "hipserve.attention.hip",
        "HiPCache": "hipserve.integrations.transformers",
        "capture_decode": "hipserve.integrations.transformers",
        "register": "hipserve.integrations.transformers",
    },
)
