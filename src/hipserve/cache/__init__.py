"""Where keys and values live."""

from hipserve.cache.offload import OffloadedLayers
from hipserve.cache.pages import MakeStore, PagedLayer
from hipserve.cache.store import HostedStore, PageStore, ResidentPages, Write

__all__ = [
    "HostedStore",
    "MakeStore",
    "OffloadedLayers",
    "PageStore",
    "PagedLayer",
    "ResidentPages",
    "Write",
]
