"""HiP attention's settings in vLLM's configuration, checked before a model is loaded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

from hipserve.cache.host import check_memory
from hipserve.config import HiPConfig
from hipserve.errors import ConfigError
from hipserve.integrations.vllm import OPTIONS_KEY
from hipserve.integrations.vllm.limits import Engine, check_engine
from hipserve.offload import Offload

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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
    `hipserve.Offload`. Its host_memory is that of all workers, its device_memory that of each.

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
    return Offload(**values).of_card(vllm_config.parallel_config.world_size)


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
        FitError: the machine has less memory than keys and values of all workers may take.
    """
    parallel = vllm_config.parallel_config
    engine = Engine(
        vllm_config.device_config.device_type,
        vllm_config.model_config.hf_text_config,
        str(vllm_config.model_config.dtype).removeprefix("torch."),
        vllm_config.cache_config.cache_dtype,
        vllm_config.cache_config.block_size,
        parallel.world_size,
        copies=parallel.data_parallel_size,
        machines=parallel.nnodes,
        connects=vllm_config.kv_transfer_config is not None,
        speculates=vllm_config.speculative_config is not None,
    )
    offload = offload_of(vllm_config)
    check_engine(hip_config(vllm_config), offload, engine)
    if offload is not None and offload.file is None:
        check_memory(offload.host_bytes)
