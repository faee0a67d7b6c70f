"""Names that a package loads on first use: importing the package stays cheap."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def loader(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names live in the modules `homes`."""

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return load


def moved(old: str, home: str, names: Sequence[str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose public `names` have moved to `home`: they warn."""

    def load(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {old!r} has no attribute {name!r}; see {home}")
        warnings.warn(f"{old}.{name} is {home}.{name} since 0.2", DeprecationWarning, stacklevel=2)
        return getattr(import_module(home), name)

    return load
