"""HiP attention's settings in vLLM's configuration, checked before a model is loaded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

from hipserve.config import HiPConfig
from hipserve.errors import ConfigError
from hipserve.integrations.rope import check_rope
from hipserve.integrations.vllm import OPTIONS_KEY
from hipserve.offload import Offload

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BLOCK_SIZE = 256
"""Tokens of a KV block unless the user says otherwise: it has summaries of all levels."""


def hip_config(vllm_config: VllmConfig) -> HiPConfig:
    """The HiPConfig of an engine.

    Raises:
        ConfigError: an unknown key, or a value out of range.
    """
    values = _table(vllm_config)
    values.pop("offload", None)
    return HiPConfig.from_dict(values)


def offload_of(vllm_config: VllmConfig) -> Offload | None:
    """Where keys and values live, if not in KV blocks: under `offload`, with the fields of
    `hipserve.Offload`.

    Raises:
        ConfigError: an unknown key, or a value out of range.
    """
    values = _table(vllm_config).get("offload")
    if values is None:
        return None
    known = [field.name for field in dataclasses.fields(Offload)]
    if not isinstance(values, dict) or not {"host_memory"} <= values.keys() <= set(known):
        expected = 'a table such as {"host_memory": "8GiB", "file": "/nvme/kv"}'
        raise ConfigError("offload", expected, repr(values))
    return Offload(**values)


def _table(vllm_config: VllmConfig) -> dict[str, Any]:
    """A copy of HiP's options."""
    options = cast("Any", vllm_config.additional_config)
    values = options.get(OPTIONS_KEY, {}) if isinstance(options, dict) else {}
    if not isinstance(values, dict):
        raise ConfigError(
            "additional_config",
            'a table of options, {"hip": {"budget": 1024}}',
            repr(values),
            "use the keys of HiPConfig",
        )
    return dict(cast("dict[str, Any]", values))


def check(vllm_config: VllmConfig) -> None:
    """Refuses what HiP attention cannot do, before a model is loaded.

    Raises:
        ConfigError: naming the option.
    """
    check_block_size(vllm_config.cache_config.block_size, hip_config(vllm_config))
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    check_cache_dtype(vllm_config.cache_config.cache_dtype, dtype)
    check_extend(vllm_config.model_config.hf_text_config, hip_config(vllm_config))
    offload = offload_of(vllm_config)
    check_meter(hip_config(vllm_config), vllm_config.device_config.device_type, offload)
    if offload is not None:
        from hipserve.integrations.vllm.offload import check_offload

        check_offload(vllm_config, offload, hip_config(vllm_config).code_bits)


def check_extend(model: Any, config: HiPConfig) -> None:
    """Raises an error where the model cannot be extended so, or the engine was not set up for it.

    Args:
        model: its text configuration, with vLLM's `--hf-overrides` on top.
    """
    if config.extend == "none":
        return
    kind = check_rope(model, config.extend).get("rope_type")
    hint = "hipserve serve --extend sets up what vLLM needs"
    if config.extend == "yarn" and kind != "yarn":
        raise ConfigError("extend", "rope_parameters of YaRN in --hf-overrides", str(kind), hint)
    if config.streams and config.trained_length is None:
        raise ConfigError("trained_length", "a length, as --hf-overrides hides it", "None", hint)
    if config.streams and config.dense_layers:
        got = ", ".join(map(str, config.dense_layers))
        hint = "leave them out; beyond the trained length every layer is pruned"
        raise ConfigError("dense_layers", 'none with extend="stream"', got, hint)


def check_meter(config: HiPConfig, device: str, offload: Offload | None) -> None:
    """Raises ConfigError where rows cannot be metered: in steps that a GPU repeats as graphs, and
    where the meter would read keys that no step needs from a file."""
    if config.meter == "off":
        return
    if device != "cpu":
        hint = "run, chat and HiPCache have a meter there"
        raise ConfigError("meter", '"off" on a GPU in vLLM', repr(config.meter), hint)
    if offload is not None:
        raise ConfigError(
            "meter", '"off" with offload', repr(config.meter), "leave out one of them"
        )


def check_cache_dtype(cache: str, model: str) -> None:
    """Raises ConfigError where keys would not be kept as the model computes them."""
    if cache not in ("auto", model):
        floats = cache in ("float16", "bfloat16", "float32")
        other = f"compute in it too (--dtype {cache})" if floats else "use --dense"
        raise ConfigError(
            "kv_cache_dtype", f"{model}, as the model computes", cache, f"leave it out, or {other}"
        )


def check_block_size(block_size: int, config: HiPConfig) -> None:
    """Raises ConfigError where runs of keys would straddle KV blocks."""
    finest = config.run_size
    if finest is not None and block_size % finest:
        raise ConfigError(
            "block_size",
            f"a multiple of {finest} (keys that share a summary)",
            str(block_size),
            "use a power of two such as 128 or 256",
        )
