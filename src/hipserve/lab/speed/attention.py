"""`bench attention`: HiP attention compared with dense attention, checked and then timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from hipserve.attention.crossover import dense_kernel, rule_for
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.lab.provenance import provenance
from hipserve.lab.speed.decode import Decode
from hipserve.lab.speed.inputs import LayerShape
from hipserve.lab.speed.numerics import require
from hipserve.lab.speed.prefill import Prefill, check_whole_budget
from hipserve.lab.speed.report import AttentionReport, Phase, Point, Timing
from hipserve.lab.speed.timing import Limits, in_turn, median_of_cycles, sweep
from hipserve.platform import resolve_backend

SWEPT_BYTES = 256 * 2**20
"""Memory read before each decode step, more than the caches hold."""

Progress = Callable[[str], object]


def bench_attention(
    lengths: Sequence[int],
    *,
    phases: Sequence[Phase] = ("prefill", "decode"),
    shape: LayerShape | None = None,
    dtype: torch.dtype = torch.bfloat16,
    config: HiPConfig | None = None,
    backend: str = "auto",
    device: str = "cpu",
    limits: Limits | None = None,
    progress: Progress = lambda _: None,
) -> AttentionReport:
    """Times one layer at each length, compared with our dense kernel and torch's SDPA.

    Args:
        lengths: context lengths, in tokens.
        phases: `prefill` of all of them, `decode` of one more token.
        shape: heads of the layer; 32/8 of 128 if None.
        config: what is kept; the defaults if None.
        device: `cpu`: GPUs are timed by `benchmarks/gpu.py`.
        limits: rounds and seconds of each contender; a few seconds if None.
        progress: is told what is being done.

    Raises:
        NumericsError: a result is wrong; no time of a wrong result is reported.
        ArgumentError: a length or the device cannot be used.
    """
    shape, config, limits = shape or LayerShape(), config or HiPConfig(), limits or Limits()
    check_inputs(lengths, shape, device, limits)
    config, kernel = _of_machine(config, backend, shape, dtype)
    made = provenance(limits.clock)
    checks = require([check_whole_budget(shape, dtype, backend)])
    points: list[Point] = []
    for phase in phases:
        for length in lengths:
            progress(f"{phase} at {length:,} tokens: checking")
            case = (Prefill if phase == "prefill" else Decode)(
                shape, length, dtype, config, backend
            )
            checks += require(case.checks())
            progress(f"{phase} at {length:,} tokens: timing")
            timings = _time(case, limits)
            points.append(Point(phase, length, timings, case.reads_all))
    name = str(dtype).removeprefix("torch.")
    ran = resolve_backend(backend, torch.device(device), dtype, shape.head_dim)
    return AttentionReport(
        provenance=made,
        shape=shape,
        dtype=name,
        backend=ran,
        dense_kernel=kernel,
        config=config,
        checks=checks,
        points=points,
    )


def _of_machine(
    config: HiPConfig, backend: str, shape: LayerShape, dtype: torch.dtype
) -> tuple[HiPConfig, str]:
    """The configuration with this machine's crossovers in it, and the kernel of its dense path."""
    kind = (dtype, shape.head_dim, shape.group_size)
    rule = rule_for(config, torch.device("cpu"), *kind)
    below = {"dense_below": rule.dense_below, "decode_dense_below": rule.decode_dense_below}
    config = config.replace(**below)
    return config, dense_kernel("cpu", *kind) if backend == "auto" else "native"


def _time(case: Prefill | Decode, limits: Limits) -> dict[str, Timing]:
    return time_prefill(case, limits) if isinstance(case, Prefill) else time_decode(case, limits)


def time_prefill(case: Prefill, limits: Limits) -> dict[str, Timing]:
    """Medians of the rounds, scaled from the heads that ran to the layer."""
    contenders, q_heads = case.contenders(), case.shape.num_q_heads
    return {
        name: Timing(statistics.median(t), len(t), round(q_heads / contenders[name].scale))
        for name, t in in_turn(contenders, limits).items()
    }


def time_decode(case: Decode, limits: Limits) -> dict[str, Timing]:
    """Medians over cycles: as many steps as share a selection."""
    memory = torch.zeros(SWEPT_BYTES // 4)
    rounds = max(limits.rounds, 3) * case.cycle
    longer = replace(limits, rounds=rounds)
    times = in_turn(case.contenders(), longer, before=lambda: sweep(memory))
    return {
        name: Timing(
            median_of_cycles(t, case.cycle if name == "hip reused" else 1),
            len(t),
            case.shape.num_q_heads,
        )
        for name, t in times.items()
    }


def check_inputs(lengths: Sequence[int], shape: LayerShape, device: str, limits: Limits) -> None:
    """Raises ArgumentError for what cannot be timed."""
    for length in lengths:
        if length < 1:
            raise ArgumentError("lengths", "1 or more tokens", str(length), "give longer ones")
    if shape.num_kv_heads < 1 or shape.num_q_heads % shape.num_kv_heads:
        heads = f"{shape.num_q_heads}/{shape.num_kv_heads}"
        raise ArgumentError("heads", "query heads divisible by KV heads", heads, "write 32/8")
    if limits.clock == "cpu" and torch.get_num_threads() > 1:
        threads = f"{torch.get_num_threads()} threads"
        raise ArgumentError("clock", "one thread for the cpu clock", threads, "add --threads 1")
    if device != "cpu":
        raise ArgumentError("device", "cpu", repr(device), "for a GPU run benchmarks/gpu.py speed")
