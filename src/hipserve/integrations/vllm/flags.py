"""vLLM's own flags behind `hipserve serve`: what is refused at once, and what vLLM's refusals mean.

Nothing here imports vLLM or torch, so that a wrong flag costs no start.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hipserve.errors import ArgumentError, BackendError, FitError, HipserveError

ATTENTION = ("--attention-backend", "--additional-config", "--attention-config", "-ac")
"""What `hipserve serve` sets up itself: vLLM would put the flag in the place of all of it."""

OWN = ("--host", "--port", "--api-key")
"""Read by `hipserve serve`, which has to know them."""


def normal(flag: str) -> str:
    """`--some_flag.key=3` as `--some-flag`: vLLM takes all of these."""
    return flag.partition("=")[0].partition(".")[0].replace("_", "-")


def check_flags(flags: Sequence[str]) -> None:
    """Refuses flags that would undo what `hipserve serve` promises, also when abbreviated.

    Raises:
        ArgumentError: naming the flag.
    """
    for flag in (normal(word) for word in flags if word.startswith("-")):
        if flag.startswith("--trust"):
            hint = "convert the checkpoint to a supported architecture"
            raise ArgumentError(flag, "no code from checkpoints", "the flag", hint)
        if _means(flag, ATTENTION):
            hint = "use --budget, --selector, --preset, --config or --dense"
            raise ArgumentError(flag, "HiP attention, which this command sets up", "a flag", hint)
        if full := _means(flag, OWN):
            hint = f"write {full} on the command line"
            raise ArgumentError(flag, f"{full} as this command reads it", "another form", hint)


def _means(flag: str, names: Sequence[str]) -> str | None:
    """The name that a flag is, or is short for: argparse takes prefixes."""
    if flag in names:
        return flag
    return next((x for x in names if len(flag) > 3 and x.startswith(flag)), None)


def check_known(flags: Sequence[str]) -> None:
    """Refuses a flag whose name appears nowhere in vLLM's sources.

    Raises:
        ArgumentError: with the flags that are spelled most like it.
    """
    names = [normal(word) for word in flags if word.startswith("--") and len(word) > 2]
    sources = "\n".join(_sources()) if names else ""
    for name in names:
        words = name.removeprefix("--").removeprefix("no-")
        spelled = rf"\b{re.escape(words)}|\b{re.escape(words.replace('-', '_'))}"
        if sources and not re.search(spelled, sources):
            known = sorted(set(re.findall(r'"(--[a-z][a-z0-9-]+)"', sources)))
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "see `hipserve-vllm serve -h`"
            raise ArgumentError(name, "a flag of hipserve serve or of vLLM", "an unknown one", hint)


def _sources() -> Iterator[str]:
    """The files of vLLM that define flags, found without importing it."""
    found = importlib.util.find_spec("vllm")
    for root in map(Path, found.submodule_search_locations or () if found else ()):
        for folder in ("config", "engine", "entrypoints"):
            for path in sorted((root / folder).rglob("*.py")):
                yield path.read_text("utf-8", "replace")


def check_model(name: str) -> None:
    """Refuses a path that leads to no directory; anything else may be a name on the hub.

    Raises:
        ArgumentError: naming the path.
    """
    path = Path(name).expanduser()
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/")
    if path.is_file():
        hint = "give the directory that holds config.json and the weights"
        raise ArgumentError("model", "a directory or a hub name", f"a file ({name})", hint)
    if is_path and not path.is_dir():
        got, hint = f"{name}: no such directory", "check the path, or give a name on the hub"
        raise ArgumentError("model", "a directory or a hub name", got, hint)


def is_engine_file(path: Path | None) -> bool:
    """`--config FILE` names vLLM's own file of flags, which is YAML; HiPConfig is TOML or JSON."""
    return path is not None and path.suffix.lower() in (".yaml", ".yml")


def read_engine_file(path: Path) -> tuple[str, ...]:
    """The flags in vLLM's own file, as words of a command line: for checks, vLLM reads it too.

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


USAGE = ("Value error, ", ": error: ", "errors.ConfigError: ", "errors.ArgumentError: ")
"""Marks of lines in which vLLM or hipserve refuses an option."""


def refusal(sentence: str, lines: Sequence[str], on_cpu: bool) -> HipserveError:
    """What the last words of a server that did not start mean, as an error of a command.

    vLLM advises `gpu_memory_utilization`, which is not what limits the KV cache on a CPU.
    """
    if re.search(r"memory for the cache blocks|cache is needed|even a single token", sentence):
        more = "--kv-cache-memory-bytes" if on_cpu else "--gpu-memory-utilization"
        facts = re.split(r"\.? *Try increasing", sentence)[0].rstrip(". ")
        return FitError(f"the server did not start: {facts}; raise {more} or lower --max-model-len")
    if any(mark in line for line in lines for mark in USAGE):
        hint = "`hipserve-vllm serve --help=all` lists vLLM's flags"
        return ArgumentError("serve", "options that vLLM takes", sentence, hint)
    return BackendError(f"the server did not start: {sentence}")
