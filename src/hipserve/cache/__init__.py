"""Where keys and values live."""

from hipserve.cache.pages import PagedLayer

__all__ = ["PagedLayer"]
