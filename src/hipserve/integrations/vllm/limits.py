"""What HiP attention cannot do in an engine: known before there is one, and without vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hipserve.config import HiPConfig
from hipserve.errors import ConfigError
from hipserve.integrations.extend import check_rope
from hipserve.integrations.factors import with_own_factors
from hipserve.offload import Offload

BLOCK_SIZE = 256
"""Tokens of a KV block unless the user says otherwise: it has summaries of all levels."""


FP8_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""What vLLM calls keys and values in fp8; the first means the second."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What HiP attention has to know of an engine; much of it is known before there is one.

    Attributes:
        device: type of its device, cpu or cuda.
        model: the text configuration of its model; None where it is not known.
        dtype: of activations.
        cache_dtype: of keys and values, `auto` for that of the activations.
        block_size: tokens of a KV block.
        workers: processes with a part of the model.
        copies: of the model, by data parallelism.
        machines: that its workers are on.
        connects: a KV connector moves blocks between engines.
        speculates: it decodes speculatively.
    """

    device: str
    model: Any
    dtype: str
    cache_dtype: str = "auto"
    block_size: int = BLOCK_SIZE
    workers: int = 1
    copies: int = 1
    machines: int = 1
    connects: bool = False
    speculates: bool = False


def check_engine(config: HiPConfig, offload: Offload | None, engine: Engine) -> None:
    """Refuses an engine that HiP attention cannot run in.

    Raises:
        ConfigError: naming the option.
    """
    check_block_size(engine.block_size, config)
    check_cache_dtype(engine.cache_dtype, engine.dtype, engine.device)
    if engine.model is not None:
        check_extend(engine.model, config)
        with_own_factors(config, engine.model)
    check_meter(config, engine.device, offload)
    if offload is not None:
        check_offload(offload, config, engine)


def check_offload(offload: Offload, config: HiPConfig, engine: Engine) -> None:
    """Raises ConfigError where keys and values cannot be apart from KV blocks."""
    on_gpu = engine.device == "cuda"
    reasons = {
        f"a device of the type {engine.device}": engine.device not in ("cpu", "cuda"),
        "no file": not on_gpu and offload.file is None,
        "a file beside a GPU": on_gpu and offload.file is not None,
        "code_bits 16, which reads the keys": config.code_bits == 16,
        "dense_layers, which read all keys in every step": on_gpu and bool(config.dense_layers),
        f"{engine.workers} worker processes": engine.workers > 1 and not on_gpu,
        f"{engine.copies} copies of the model": engine.copies > 1,
        f"workers on {engine.machines} machines": engine.machines > 1,
        "a KV connector, which would move the index only": engine.connects,
        "speculative decoding": engine.speculates,
        f"keys and values in {engine.cache_dtype}": engine.cache_dtype in FP8_CACHES,
    }
    place = "workers of one machine, host memory beside a GPU"
    place = place if on_gpu else "one worker, a file beside a CPU"
    for reason in (reason for reason, found in reasons.items() if found):
        expected = f"{place}, code_bits 4 or 8, the model's dtype, and no connector"
        raise ConfigError("offload", expected, reason)


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


def check_cache_dtype(cache: str, model: str, device: str = "cpu") -> None:
    """Raises ConfigError where keys would be kept neither as the model computes them, nor in fp8 on
    a GPU."""
    fp8 = () if device == "cpu" else FP8_CACHES
    if cache not in ("auto", model, *fp8):
        floats = cache in ("float16", "bfloat16", "float32")
        other = f"compute in it too (--dtype {cache})" if floats else "use --dense"
        expected = f"{model}, as the model computes" + (", or fp8" if fp8 else "")
        raise ConfigError("kv_cache_dtype", expected, cache, f"leave it out, or {other}")


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
