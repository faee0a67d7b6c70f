"""The build: scikit-build-core's, which asks for torch only where none is installed."""

from __future__ import annotations

from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from torch_headers import OLDEST, find

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What pip installs into an isolated build."""
    return [*_build.get_requires_for_build_wheel(config_settings), *_torch(config_settings)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*_build.get_requires_for_build_editable(config_settings), *_torch(config_settings)]


def _torch(config_settings: Settings) -> list[str]:
    native = (config_settings or {}).get("cmake.define.HIPSERVE_NATIVE", "ON")
    wanted = str(native).upper() not in ("OFF", "0", "FALSE", "NO")
    return [f"torch>={'.'.join(map(str, OLDEST))}"] if wanted and find() is None else []
