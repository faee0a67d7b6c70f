"""Compiles the kernels of an engine before its first request.

Triton compiles a kernel where it is first launched, which takes about a second: without this the
first prompt, and later ones of other lengths, would wait for six and more. `chunk_steps` has a step
for each kernel that chunks of prompts take; vLLM itself runs the steps that it captures as graphs.
Triton keeps what it has compiled on the disk, for the next start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.logger import init_logger

from hipserve.integrations.vllm.kv_block import rebuild_index
from hipserve.integrations.vllm.step import HiPStep
from hipserve.plan import BatchLayout, PruningRule, StepPlan, split_batch

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from hipserve.integrations.vllm.layer import HiPImpl

logger = init_logger("vllm.hipserve")  # vLLM shows the loggers below its own name


class Limits(NamedTuple):
    """What steps of an engine may be.

    Attributes:
        tokens: rows of a step, at most.
        requests: of a step, at most.
        longest: keys of a sequence, at most.
    """

    tokens: int
    requests: int
    longest: int


def chunk_steps(limits: Limits, query_block_size: int) -> Iterator[list[tuple[int, int]]]:
    """Rows and first position of every request of a step: chunks of each length that has kernels
    of its own, at the start of a prompt and at the end of the longest, alone and beside as many
    single rows as make a difference.

    Kernels differ by powers of two of rows and of query blocks.
    """
    end = limits.longest // query_block_size * query_block_size
    longest = min(limits.tokens, limits.longest)
    chunks = [n for i in range(longest.bit_length()) if (n := (1 << i) + 1) < longest]
    for rows in [*chunks, longest]:
        for first in (0, max(end - -(-rows // query_block_size) * query_block_size, 0)):
            most = min(limits.requests - 1, limits.tokens - rows)
            others = [(1 << i) - 1 for i in range(1, (most + 1).bit_length())]
            for count in [0, *others] if rows <= query_block_size else [0]:
                yield [(rows, first), *[(1, first)] * count]


def make_step(
    requests: list[tuple[int, int]], block_table: Tensor, rule: PruningRule, *, selects: bool
) -> HiPStep:
    """A step that writes nothing.

    Args:
        requests: rows and first position of each.
        block_table: `[num_reqs, max_pages]` int32, of at least as many requests.
        rule: of its layers.
        selects: they may be pruned.
    """
    rows = [n for n, _ in requests]
    seq_lens = [first + n for n, first in requests]
    layout = BatchLayout.of(block_table[: len(rows)], seq_lens, rows)
    layout, _ = split_batch(layout, rule.query_block_size)
    tokens = sum(rows)
    slots = torch.full((tokens,), -1, dtype=torch.int64, device=block_table.device)
    selects = selects and layout.may_prune(rule)
    return HiPStep(tokens, slots, StepPlan.make(layout, rule), selects, counted_layer="")


def empty_blocks(spec: AttentionSpec, device: torch.device) -> Tensor:
    """Two KV blocks of zeros in the shape in which layers of this spec get theirs,
    `[2, num_kv_heads, block_size, content]`."""
    heads, size, item = spec.num_kv_heads, spec.block_size, spec.dtype.itemsize
    content = 2 * spec.head_size
    block = spec.page_size_bytes // item
    raw = torch.zeros(2 * block, dtype=spec.dtype, device=device)
    strides = (block, content, heads * content, 1)
    return raw.as_strided((2, heads, size, content), strides)


@torch.no_grad()
def compile_kernels(
    layers: dict[str, Any],
    spec: AttentionSpec,
    rule: PruningRule,
    dtype: torch.dtype,
    limits: Limits,
) -> None:
    """Runs `chunk_steps` on one layer of every kind, in blocks of zeros that no request has.

    Args:
        layers: vLLM's attention layers of one KV cache group, by name.
        spec: of their blocks.
        rule: which query blocks are pruned.
        dtype: of queries, keys and values.
        limits: of the engine's steps.
    """
    began = time.perf_counter()
    first: HiPImpl = next(iter(layers.values())).impl
    device = first.device
    blocks = empty_blocks(spec, device)
    columns = -(-limits.longest // spec.block_size)
    table = torch.zeros(limits.requests, columns, dtype=torch.int32, device=device)
    q = torch.zeros(limits.tokens, first.num_heads, first.head_size, dtype=dtype, device=device)
    k, out = q[:, : first.num_kv_heads].contiguous(), torch.empty_like(q)
    found = torch.zeros(1, dtype=torch.int64, device=device)
    for layer in kinds_of(layers):
        if layer.impl.keeps_index(layer):
            rebuild_index(layer.impl.pages_of(layer, blocks), found)
        selects = not layer.impl.is_dense(layer)
        for requests in chunk_steps(limits, rule.query_block_size):
            step = make_step(requests, table, rule, selects=selects)
            rows = slice(step.num_tokens)
            new = q[rows], k[rows], k[rows]
            layer.impl.forward(layer, *new, kv_cache=blocks, attn_metadata=step, output=out[rows])
    out[:1].cpu()  # waits for the device
    logger.info("HiP attention's kernels are compiled: %.1f s", time.perf_counter() - began)


def kinds_of(layers: dict[str, Any]) -> list[Any]:
    """One layer of every kind: of those that read alike."""
    kinds: dict[Any, Any] = {}
    for layer in layers.values():
        kinds.setdefault(layer.impl.kind(layer), layer)
    return list(kinds.values())
