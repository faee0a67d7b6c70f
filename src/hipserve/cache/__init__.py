"""Where keys and values live."""

from hipserve.cache.offload import OffloadedLayers
from hipserve.cache.pages import MakeStore, PagedLayer
from hipserve.cache.store import PageStore, ResidentPages

__all__ = ["MakeStore", "OffloadedLayers", "PageStore", "PagedLayer", "ResidentPages"]
