"""GGUF files: transformers' loader for the weights, the file's own metadata for all that it misses.

The loader gives SmolLM2 the wrong end of a turn, Gemma a tokenizer of another kind, Llama 3 another
split of numbers, and drops every scaling of rotary positions; without a message.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hipserve.errors import ArgumentError
from hipserve.models.gguf_tokenizer import end_ids, make_tokenizer

Fields = dict[str, Any]
Contents = tuple[Fields, torch.Tensor | None]
NEEDED = ("gguf", "accelerate")


def load_gguf(path: Path, dtype: torch.dtype | str) -> tuple[Any, Any, Any]:
    """Configuration, tokenizer and model, dequantised to `dtype` (`auto`: bfloat16).

    Raises:
        ArgumentError: a package is missing, or the file holds what would be computed wrongly.
        OSError, ValueError: the file is broken, or transformers cannot load its architecture.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        got = f"no {' and no '.join(missing)}"
        hint = "pip install 'hipserve[gguf]'"
        raise ArgumentError("model", "the packages that read GGUF files", got, hint)
    with _reading_once() as read:
        fields, factors = read(path)
        where = {"gguf_file": path.name, "local_files_only": True}
        settings = AutoConfig.from_pretrained(path.parent, **where)
        _scale_positions(settings, fields, path)
        tokenizer = make_tokenizer(fields)
        both: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            **where,
            config=settings,
            dtype=torch.bfloat16 if dtype == "auto" else dtype,
            attn_implementation="hip",
            output_loading_info=True,
        )
    model, loaded = both
    if lost := loaded["missing_keys"]:
        raise ValueError(f"it has no weights for {', '.join(sorted(lost)[:3])}")
    if factors is not None:
        _divide_frequencies(model, factors)
    model.generation_config.eos_token_id = end_ids(fields)
    return settings, tokenizer, model


@contextmanager
def _reading_once() -> Generator[Callable[[Path], Contents]]:
    """The file is parsed once, not by every part of transformers, nor the names of tensors for
    every module; and no bar is drawn."""
    package: Any = importlib.import_module("gguf")
    loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    kept = package.GGUFReader, package.get_tensor_name_map, loader.tqdm
    package.GGUFReader = read = functools.cache(kept[0])
    package.get_tensor_name_map = functools.cache(kept[1])
    loader.tqdm = _without_bar
    try:
        yield lambda path: _contents(read(str(path)))  # pyright: ignore[reportUnknownLambdaType]
    finally:
        package.GGUFReader, package.get_tensor_name_map, loader.tqdm = kept


def _without_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


def _contents(reader: Any) -> Contents:
    """The metadata, and the factors that slow down rotary frequencies (Llama 3.1), if there."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    return fields, torch.tensor(found[0].data).float() if found else None


def _scale_positions(settings: Any, fields: Fields, path: Path) -> None:
    """Linear and YaRN scaling of rotary positions, which the loader does not support."""
    prefix = f"{fields['general.architecture']}.rope.scaling"
    kind = fields.get(f"{prefix}.type", "none")
    if kind == "none":
        return
    if kind not in ("linear", "yarn"):
        expected = "rotary positions scaled by none, linear or yarn"
        raise ArgumentError("model", expected, f"{kind} in {path.name}")
    scaling = {"rope_type": kind, "factor": float(fields[f"{prefix}.factor"])}
    original = fields.get(f"{prefix}.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = int(original)
    rope = settings.rope_parameters
    rope.get("full_attention", rope).update(scaling)


def _divide_frequencies(model: Any, factors: torch.Tensor) -> None:
    """`factors` `[head_dim / 2]`: Llama 3.1's scaling, which the file keeps as a tensor."""
    rotary = model.get_decoder().rotary_emb
    for name in ("inv_freq", "original_inv_freq"):
        if hasattr(rotary, name):
            frequencies = getattr(rotary, name)
            frequencies.copy_(frequencies / factors.to(frequencies.device))
    model.config.hip_frequencies = rotary.inv_freq.tolist()  # for those who see no module
