"""Models that answer through HiP attention, the bundled one first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hipserve.models.bundled import BUNDLED, bundled_path

if TYPE_CHECKING:
    from hipserve.models.conversation import Conversation, Statistics
    from hipserve.models.loading import LoadedModel, load

__all__ = ["BUNDLED", "Conversation", "LoadedModel", "Statistics", "bundled_path", "load"]

_HOMES = {
    "Conversation": "hipserve.models.conversation",
    "Statistics": "hipserve.models.conversation",
    "LoadedModel": "hipserve.models.loading",
    "load": "hipserve.models.loading",
}


def __getattr__(name: str) -> Any:
    """Loads what needs torch and transformers on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hipserve.models' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
