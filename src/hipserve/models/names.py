"""Which names a model may have; importing this loads no torch."""

from __future__ import annotations

from pathlib import Path

from hipserve.errors import ArgumentError
from hipserve.models.bundled import BUNDLED
from hipserve.models.gguf_files import find_gguf


def check_name(name: str) -> None:
    """Refuses a name that is neither bundled nor on this machine nor one of the hub.

    Raises:
        ArgumentError: saying why.
    """
    if name == BUNDLED:
        return
    if not name.strip():
        raise unknown(name, "no name")
    if find_gguf(name):
        return
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        raise unknown(name, "no such file")
    if path.is_file():
        raise unknown(name, "a file of another kind")
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if is_path and not path.is_dir():
        raise unknown(name, "no such directory")
    if path.is_dir() and not (path / "config.json").is_file():
        raise unknown(name, "a directory without a config.json")


def unknown(name: str, reason: str) -> ArgumentError:
    """The error for a model that is not there."""
    return ArgumentError(
        "model",
        f'"{BUNDLED}" (bundled), a directory or a hub name of a causal language model',
        f'"{name}" ({reason})',
        "check the name, or download the checkpoint first and give its directory",
    )
