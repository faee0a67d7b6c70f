"""Hierarchically pruned attention for serving long contexts: faster, in less memory, untrained."""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, BackendError, ConfigError, FitError, HipserveError

if TYPE_CHECKING:
    from hipserve.attention.hip import hip_attention
    from hipserve.integrations.transformers import HiPCache, register

__version__ = _version("hipserve")
__all__ = [
    "ArgumentError",
    "BackendError",
    "ConfigError",
    "FitError",
    "HiPCache",
    "HiPConfig",
    "HipserveError",
    "hip_attention",
    "register",
]

_HOMES = {
    "hip_attention": "hipserve.attention.hip",
    "HiPCache": "hipserve.integrations.transformers",
    "register": "hipserve.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    """Loads the heavy names on first use, so that `import hipserve` stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hipserve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
