"""The config.json of a model by name, from this machine's disks; importing this loads no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hipserve.errors import ArgumentError
from hipserve.models.bundled import BUNDLED, bundled_path
from hipserve.models.gguf_files import find_gguf

EXPECTED = "a directory or a file with a config.json, or a hub name whose config.json is here"

FILES = {".json", ".gguf", ".safetensors", ".txt", ".toml", ".bin", ".pt"}
"""A name that ends so is meant as a file, not as a hub name."""


def read_config(name: str) -> dict[str, Any]:
    """The table in a model's config.json; nothing is downloaded.

    Args:
        name: the bundled model, a directory, a config.json, or a hub name in the hub's cache.

    Raises:
        ArgumentError: there is none on this machine, or it is no JSON table.
    """
    path = find_config(name)
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "model", "a config.json that can be read", f"{path} ({error})"
        ) from None
    if not isinstance(table, dict):
        raise ArgumentError("model", "a table in config.json", f"{path} with something else")
    return table


def find_config(name: str) -> Path:
    """Where the config.json of a model is.

    Raises:
        ArgumentError: it is not on this machine.
    """
    if name == BUNDLED:
        return bundled_path() / "config.json"
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    if find_gguf(name):
        hint = "give the checkpoint that the file was made from"
        raise ArgumentError("model", EXPECTED, f"{name}, a GGUF file", hint)
    if path.is_dir():
        raise ArgumentError("model", EXPECTED, f"{name}, without a config.json")
    if path.exists():
        raise ArgumentError("model", EXPECTED, f"{name}, a file of another kind")
    if path.suffix in FILES or name.startswith(("/", "./", "../", "~")):
        raise ArgumentError("model", EXPECTED, f"{name}, which does not exist")
    return _in_hub_cache(name)


def _in_hub_cache(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise ArgumentError("model", EXPECTED, f"{name!r}, which is neither") from None
    if isinstance(found, str):
        return Path(found)
    hint = f"hf download {name} config.json"
    raise ArgumentError("model", EXPECTED, f"{name}, which is not on this machine", hint)
