"""Selectors by name: how a search finds the key blocks that a query block reads.

Each has a file here, with its options and what it needs, and one in every backend of
`hipserve.ops.select_blocks`. CONTRIBUTING.md describes how to add one.
"""

from __future__ import annotations

from hipserve.selectors.bound import Bound
from hipserve.selectors.selector import Selector
from hipserve.selectors.tree import Tree

SELECTORS: dict[str, type[Selector]] = {"tree": Tree, "bound": Bound}
"""By the name that `HiPConfig.selector` gives."""

__all__ = ["SELECTORS", "Bound", "Selector", "Tree"]
