"""Where the model that ships with the package lies; importing this loads no torch."""

from __future__ import annotations

import importlib
from pathlib import Path

BUNDLED = "acorn"
"""Name of the model that ships with the package."""


def bundled_path() -> Path:
    """Directory of the bundled model's weights, tokenizer and card."""
    places = importlib.import_module("hipserve").__path__  # an editable install has two
    paths = [Path(place) / "models" / BUNDLED for place in places]
    return next(path for path in paths if (path / "config.json").exists())
