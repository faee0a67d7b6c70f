"""Models that answer through HiP attention, the bundled one first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hipserve.lazy import loader as _loader
from hipserve.models.bundled import BUNDLED, bundled_path

if TYPE_CHECKING:
    from hipserve.models.conversation import Conversation, Statistics
    from hipserve.models.loading import LoadedModel, load

__all__ = ["BUNDLED", "Conversation", "LoadedModel", "Statistics", "bundled_path", "load"]

__getattr__ = _loader(
    __name__,
    {
        "Conversation": "hipserve.models.conversation",
        "Statistics": "hipserve.models.conversation",
        "LoadedModel": "hipserve.models.loading",
        "load": "hipserve.models.loading",
    },
)
