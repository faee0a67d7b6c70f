"""Where the model that ships with the package is; importing this loads no torch."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "acorn"
"""Name of the model that ships with the package."""


def bundled_path() -> Path:
    """Directory of the bundled model's weights, tokenizer and card."""
    return Path(__file__).parent / BUNDLED
