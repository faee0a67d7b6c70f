"""What `hipserve serve` refuses before a server starts: flags and settings that cannot work."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hipserve.errors import ArgumentError
from hipserve.integrations.extend import text_config
from hipserve.integrations.vllm.limits import BLOCK_SIZE, Engine, check_engine
from hipserve.serving.command_line import Server, normal
from hipserve.serving.environment import on_cpu
from hipserve.serving.fit import number

ATTENTION = ("--attention-backend", "--additional-config", "--attention-config", "-ac")
"""What `hipserve serve` sets up itself: vLLM would put the flag in the place of all of it."""

PLAIN = ("default", "llama3")
"""Types of rotary positions with which vLLM takes a model's `max_position_embeddings` as they
are."""

OWN = ("--host", "--port", "--api-key")
"""Read by `hipserve serve`, which has to know them."""


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


def check_context(server: Server, table: Mapping[str, Any] | None) -> None:
    """Refuses a context beyond what the model was trained for, where vLLM would advise to read on
    regardless.

    Args:
        server: to be.
        table: its model's config.json; None where it is not known.

    Raises:
        ArgumentError: naming the option.
    """
    asked = number(server.option("--max-model-len"))
    changed = server.option("--hf-overrides") or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN")
    if table is None or asked is None or changed:
        return
    model = text_config(table)
    rope = model.rope_parameters.get("full_attention", model.rope_parameters)
    trained = int(getattr(model, "max_position_embeddings", None) or 0)
    if rope.get("rope_type") in PLAIN and 0 < trained < asked:
        expected = f"at most {trained:,} tokens, which the model was trained for"
        hint = "leave it out and add --extend stream to read beyond them (docs/extend.md)"
        raise ArgumentError("--max-model-len", expected, f"{asked:,}", hint)


def check_settings(server: Server, table: Mapping[str, Any] | None, dtype: str | None) -> None:
    """Refuses settings of HiP attention that the engine would refuse, half a minute later.

    Args:
        server: to be.
        table: its model's config.json; None where it is not known.
        dtype: of the model; None where it is not known.

    Raises:
        ArgumentError: naming the option.
    """
    if server.config is None:
        return
    cache = server.option("--kv-cache-dtype") or "auto"
    size = server.option("--block-size") or ""
    engine = Engine(
        device="cpu" if on_cpu() else "cuda",
        model=_overridden(table, server.option("--hf-overrides")),
        dtype=dtype or cache,
        cache_dtype=cache,
        block_size=int(size) if size.isdigit() else BLOCK_SIZE,
        workers=server.cards * server.stages,
        copies=server.copies,
        machines=server.machines,
        connects=server.option("--kv-transfer-config") is not None,
        speculates=server.option("--speculative-config", "-sc") is not None,
    )
    check_engine(server.config, server.offload, engine)


def _overridden(table: Mapping[str, Any] | None, overrides: str | None) -> Any:
    """The text configuration as vLLM will read it; None where that is not known."""
    try:
        changes = json.loads(overrides or "{}")
    except ValueError:
        return None
    return text_config({**table, **changes}) if table and isinstance(changes, dict) else None
