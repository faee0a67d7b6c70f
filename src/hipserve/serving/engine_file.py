"""vLLM's own file of flags, behind `--config`: read here for checks only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hipserve.errors import ArgumentError


def is_engine_file(path: Path | None) -> bool:
    """`--config FILE` names vLLM's own file of flags, which is YAML; HiPConfig is TOML or JSON."""
    return path is not None and path.suffix.lower() in (".yaml", ".yml")


def read_engine_file(path: Path) -> tuple[str, ...]:
    """The flags in vLLM's own file, as words of a command line.

    Raises:
        ArgumentError: no such file, or no table of flags.
    """
    import yaml

    expected = "vLLM's flags as YAML, such as `max-model-len: 8192`"
    hint = "or give a HiPConfig as .toml or .json"
    try:
        values: Any = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ArgumentError("config", expected, f"{path}: {reason}", hint) from error
    if not isinstance(values, dict):
        raise ArgumentError("config", expected, f"{path}: no table", hint)
    if "model" in values or "model_tag" in values:
        hint = "write it behind `hipserve serve`"
        raise ArgumentError("config", "no model in vLLM's file", str(path), hint)
    return tuple(word for key, value in values.items() for word in (f"--{key}", str(value)))
