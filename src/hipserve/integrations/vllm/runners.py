"""What hipserve changes of vLLM's model runners: `compat` has the reasons, in one ledger."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.config import set_current_vllm_config

from hipserve.integrations.vllm.compat import wrap

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True, slots=True)
class StepRequests:
    """The requests of a step.

    Attributes:
        rows: the request of every row, or None where it is not known.
        started: requests whose first step this is, resumed ones included.
        ended: requests whose state ends before it, those that started included.
    """

    rows: tuple[Hashable, ...] | None
    started: frozenset[Hashable] = frozenset()
    ended: frozenset[Hashable] = frozenset()


_current: StepRequests | None = None
_started: frozenset[Hashable] = frozenset()


def step_requests(common: CommonAttentionMetadata) -> StepRequests:
    """The requests of the step that is being built.

    vLLM's second model runner (GPU) gives the index of the request in its table, stable for the
    request's life. Its first runner (CPU) does not. `follow_requests` listens to both.
    """
    if common.req_idx is not None:
        rows = tuple(int(i) for i in common.req_idx[: common.num_reqs])
        return StepRequests(rows, _started, _started)
    if _current is not None and _current.rows and len(_current.rows) <= common.num_reqs:
        return _current
    return StepRequests(None)


def join_runners() -> None:
    """Puts in place what layers need of the model runners; where layers are made, runners exist."""
    show_configuration()
    follow_requests()
    receive_from_stages()


@functools.cache
def show_configuration() -> None:
    """Lets the backend see the engine's configuration while vLLM asks it for its KV cache specs."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "get_kv_cache_spec", showing_configuration)
    if (second := second_runner()) is not None:
        wrap(second, "get_kv_cache_spec", showing_configuration)


def showing_configuration(ask: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ask)
    def get_kv_cache_spec(runner: Any) -> Any:
        with set_current_vllm_config(runner.vllm_config):
            return ask(runner)

    return get_kv_cache_spec


def second_runner() -> Any:
    """The class of vLLM's second model runner, which is loaded where it runs; else None."""
    module = sys.modules.get("vllm.v1.worker.gpu.model_runner")
    return None if module is None else module.GPUModelRunner


@functools.cache
def follow_requests() -> None:
    """Lets the model runners say which requests start, and the first one also rows and ends.

    Rows of unknown requests keep no selection, and the index of all their earlier keys is built
    again: where vLLM has other methods, steps are slower but right.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_update_states", noting_the_ended)
    wrap(GPUModelRunner, "_build_attention_metadata", telling_the_rows)
    if (second := second_runner()) is not None:
        wrap(second, "add_requests", noting_the_started)


def noting_the_started(add: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add)
    def add_requests(runner: Any, scheduled: Any) -> Any:
        global _started
        done = add(runner, scheduled)
        index = runner.req_states.req_id_to_index
        _started = frozenset(index[request.req_id] for request in scheduled.scheduled_new_reqs)
        return done

    return add_requests


def noting_the_ended(update: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(update)
    def update_states(runner: Any, scheduled: Any) -> Any:
        started = set(scheduled.scheduled_cached_reqs.resumed_req_ids)
        started |= {request.req_id for request in scheduled.scheduled_new_reqs}
        ended = set(scheduled.finished_req_ids) | set(scheduled.preempted_req_ids or ()) | started
        runner.hipserve_started = getattr(runner, "hipserve_started", set()) | started
        runner.hipserve_ended = getattr(runner, "hipserve_ended", set()) | ended
        return update(runner, scheduled)

    return update_states


def telling_the_rows(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_attention_metadata(runner: Any, *positional: Any, **named: Any) -> Any:
        global _current
        started, ended = (
            frozenset(getattr(runner, name, ())) for name in ("hipserve_started", "hipserve_ended")
        )
        _current = StepRequests(tuple(runner.input_batch.req_ids), started, ended)
        runner.hipserve_started, runner.hipserve_ended = set(), set()
        try:
            return build(runner, *positional, **named)
        finally:
            _current = None

    return build_attention_metadata


@functools.cache
def receive_from_stages() -> None:
    """Lets a later pipeline stage start without a warm-up.

    vLLM makes the buffer for what the stage before sends only in the first model runner's dummy
    run, and CPU workers leave that out in eager mode and under VLLM_CPU_CI_ENV.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "sync_and_gather_intermediate_tensors", making_room)


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
def keep_draws() -> None:
    """Lets seeded requests survive a prompt that is read in several chunks on a CPU.

    The first model runner samples a token after every chunk, throws it away, and rewinds the
    request's generator by four offsets, which only CUDA generators have. Here the generator is put
    back where it was, and the answer is that of the same prompt read in a single chunk.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_sample", putting_back)
    wrap(GPUModelRunner, "_bookkeeping_sync", without_rewinding)


def putting_back(sample: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(sample)
    def sample_and_put_back(runner: Any, *positional: Any, **named: Any) -> Any:
        before = [(generator, generator.get_state()) for generator in discarded(runner)]
        sampled = sample(runner, *positional, **named)
        for generator, state in before:
            generator.set_state(state)
        return sampled

    return sample_and_put_back


def discarded(runner: Any) -> list[Any]:
    """The generators of the rows whose sampled token is thrown away."""
    thrown_away = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
    found = map(runner.input_batch.generators.get, thrown_away.tolist())
    return [generator for generator in found if generator is not None]


def without_rewinding(bookkeep: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(bookkeep)
    def bookkeeping(runner: Any, *positional: Any, **named: Any) -> Any:
        batch = runner.input_batch
        generators, batch.generators = batch.generators, {}
        try:
            return bookkeep(runner, *positional, **named)
        finally:
            batch.generators = generators

    return bookkeeping
