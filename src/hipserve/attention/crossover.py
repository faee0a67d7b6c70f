"""The fastest dense kernel of a CPU, and from where on pruning pays: measured once.

Both depend on the machine: with AMX, torch's dense kernel can be several times as fast as ours, and
pruning pays later. A measurement takes some tenths of a second, the first time that a kind of layer
runs on a machine. It counts the processor time of one thread, which a busy machine hardly changes.
The result is kept in the user's cache directory, where all processes of a host find the same one.
`HIPSERVE_MEASURE=0` takes our kernel and `BREAK_EVEN` instead.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hipserve.attention.torch_dense import attend_rows
from hipserve.config import NO_INDEX, HiPConfig
from hipserve.ops import block_sparse_attention, build_index, select_blocks
from hipserve.plan import BatchLayout, PruningRule, pruning_rule
from hipserve.platform import cpu_identity, cpu_refusal, logger, measured, measuring
from hipserve.types import KeyPool

DenseKernel = Literal["native", "sdpa"]

ROUNDS = 5
"""Timed calls after a warm-up; the minimum counts."""

MARGIN = 0.9
"""Torch's kernel is used where it takes less than this share of our time: it rounds chunks and one
pass differently."""

PROMPT = 1024
"""Tokens of the prompt that both dense kernels read."""

ROWS = 256
"""Rows at the end of a context that are timed."""

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536)
"""Contexts at which pruning is compared with dense attention, the shortest first."""

STEP = 1024
"""A crossover is a multiple of it."""

PATIENCE = 2.0
"""Seconds after which the rest is estimated."""

_IRRELEVANT = (
    "dense_layers",
    "dense_below",
    "decode_dense_below",
    "refresh_interval",
    "extend",
    "extend_factor",
    "trained_length",
    "seed",
    "calibration",
    "budget_factors",  # heads read the budget on average, and layers share one rule
)


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What the speed of a layer depends on, besides the machine and the configuration."""

    dtype: torch.dtype
    head_dim: int
    group_size: int

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}, head_dim {self.head_dim}, {self.group_size} query heads a KV head"


def rule_of(config: HiPConfig, q: Tensor, num_kv_heads: int) -> PruningRule:
    """The pruning rule of `config` for q `[..., num_q_heads, head_dim]`.

    A `dense_below` of None is measured on a CPU with native kernels, and `BREAK_EVEN` on other
    devices and while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return pruning_rule(config, q.device.type)
    return rule_for(config, q.device, q.dtype, q.shape[-1], q.shape[-2] // num_kv_heads)


def rule_of_whole(config: HiPConfig, q: Tensor, num_kv_heads: int) -> PruningRule | None:
    """The rule where the index of all keys is built in the same call.

    None for a single row, which costs less than the index, unless `dense_below` is given.

    q: `[batch, query_len, num_q_heads, head_dim]`.
    """
    searched = config.run_size is not None and not config.streams
    if q.shape[1] == 1 and config.dense_below is None and searched:
        return None
    return rule_of(config, q, num_kv_heads)


@functools.lru_cache(256)
def rule_for(
    config: HiPConfig, device: torch.device, dtype: torch.dtype, head_dim: int, group_size: int
) -> PruningRule:
    """As `rule_of`, from the properties of q."""
    kind = LayerKind(dtype, head_dim, group_size)
    if config.dense_below is not None or device.type != "cpu" or not _may_measure(kind):
        return pruning_rule(config, device.type)
    kernel = dense_kernel("cpu", dtype, head_dim, group_size)
    name = f"dense below; {cpu_identity()}; {kind}; {_costs(config)}"
    below = measured(name, lambda: _break_even(kind, config, kernel), _is_position)
    logger.info("%s: prompts are read densely below %d tokens", kind, below)
    return pruning_rule(config, "cpu", below)


def dense_kernel(device: str, dtype: torch.dtype, head_dim: int, group_size: int) -> DenseKernel:
    """The fastest dense kernel of this CPU: ours, or what torch's SDPA runs."""
    if device != "cpu":
        return "native"
    return _dense_kernel(LayerKind(dtype, head_dim, group_size))


@functools.lru_cache(64)
def _dense_kernel(kind: LayerKind) -> DenseKernel:
    if not _may_measure(kind):
        return "native"
    name = f"dense kernel; {cpu_identity()}; {kind}"
    kernel = measured(name, lambda: _faster(kind), lambda x: x in ("native", "sdpa"))
    logger.info("%s: dense attention by %s", kind, "torch" if kernel == "sdpa" else "hipserve")
    return cast("DenseKernel", kernel)


def _may_measure(kind: LayerKind) -> bool:
    return measuring() and not cpu_refusal(torch.device("cpu"), kind.dtype, kind.head_dim)


def _costs(config: HiPConfig) -> str:
    """The fields that change the cost of a pruned query block, where they are not the defaults."""
    default, values = HiPConfig().to_dict(), config.to_dict()
    kept = [n for n, x in values.items() if n not in _IRRELEVANT and x != default[n]]
    return ", ".join(f"{name} {values[name]}" for name in kept) or "default"


def _is_position(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31


@torch.no_grad()
def _faster(kind: LayerKind) -> DenseKernel:
    """The faster kernel, for the same prompt."""
    case = _Case(kind, PROMPT, PROMPT)
    try:
        native, sdpa = _quickest(case.native, case.sdpa)
    except (RuntimeError, AttributeError, TypeError):  # torch has no such kernel for these heads
        return "native"
    return "sdpa" if sdpa < MARGIN * native else "native"


@torch.no_grad()
def _break_even(kind: LayerKind, config: HiPConfig, kernel: DenseKernel) -> int:
    """Position from which a pruned query block takes less time than a dense one."""
    plain: dict[str, Any] = {"extend": "none", "budget_factors": ()}
    config = config.replace(dense_below=0, decode_dense_below=0, **plain)
    began, before, length = time.perf_counter(), (0, 0.0), 0
    for length in CONTEXTS:
        if not _prunes(config, length - ROWS):
            continue
        case = _Case(kind, length, ROWS, config)
        dense, pruned = _quickest(case.sdpa if kernel == "sdpa" else case.native, case.pruned)
        if pruned <= dense:
            return _crossing(before, (length, math.log(pruned / dense)))
        before = (length, math.log(pruned / dense))
        if time.perf_counter() - began > PATIENCE:
            break
    # Dense time grows with the context; that of a pruned block is nearly constant.
    return _rounded(length * math.exp(before[1]))


def _prunes(config: HiPConfig, position: int) -> bool:
    return pruning_rule(config, "cpu").prunes(position, config.query_block_size)


def _crossing(before: tuple[int, float], after: tuple[int, float]) -> int:
    """The length at which the logarithm of a ratio passes 0, rounded up."""
    (low, above), (high, below) = before, after
    if not low:
        return high
    return _rounded(low * (high / low) ** (above / (above - below)))


def _rounded(length: float) -> int:
    return math.ceil(length / STEP) * STEP


class _Case:
    """The last `rows` of a context, for one KV head."""

    def __init__(
        self, kind: LayerKind, length: int, rows: int, config: HiPConfig | None = None
    ) -> None:
        made = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"generator": made, "dtype": torch.float32, "device": "cpu"}
        q_shape = (rows, kind.group_size, kind.head_dim)
        self.q = torch.randn(q_shape, **options).to(kind.dtype)
        k, v = (
            torch.randn(1, length, 1, kind.head_dim, **options).to(kind.dtype) for _ in range(2)
        )
        self.pool, self.config = KeyPool(k, v), config
        self.index = build_index(k, **(config.index_form if config else NO_INDEX)._asdict())
        self.position = length - rows
        self.pages = torch.zeros(1, 1, dtype=torch.int32, device="cpu")
        self.layout = BatchLayout.of(self.pages, [length], [rows])

    def native(self) -> object:
        return block_sparse_attention(self.q, self.pool, self.layout, check=False)

    def sdpa(self) -> object:
        scale = self.q.shape[-1] ** -0.5
        parts: Iterator[Any] = attend_rows(self.q, self.pool, self.pages[0], self.position, scale)
        out = torch.empty_like(self.q)
        for heads, part, _ in parts:
            out[:, heads] = part
        return out

    def pruned(self) -> object:
        options: dict[str, Any] = {"config": self.config, "check": False}
        selection = select_blocks(self.q, self.index, self.layout, **options)
        return block_sparse_attention(self.q, self.pool, self.layout, selection, **options)


def _quickest(*calls: Callable[[], object]) -> list[float]:
    """Minimum seconds of one thread for each call; they alternate, and the first round warms up."""
    times: list[list[float]] = [[] for _ in calls]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(1 + ROUNDS):
            for call, spent in zip(calls, times, strict=True):
                start = time.thread_time()
                call()
                spent.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return [min(spent[1:]) for spent in times]
