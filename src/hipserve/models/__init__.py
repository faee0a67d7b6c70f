"""Models that answer through HiP attention, the bundled one first."""

from hipserve.models.conversation import Conversation, Statistics
from hipserve.models.loading import BUNDLED, LoadedModel, load

__all__ = ["BUNDLED", "Conversation", "LoadedModel", "Statistics", "load"]
