"""The kernels of a GPU against their definition, on random configurations: `gpu.py check`."""

from __future__ import annotations

import dataclasses
import functools
import math
import multiprocessing
import random
import time
from collections.abc import Iterable
from typing import Any

import torch

from gpu_inputs import say
from hipserve import HiPConfig
from hipserve.ops import block_sparse_attention, select_blocks
from hipserve.plan import BatchLayout
from hipserve.platform import FP8_DTYPES
from hipserve.testing.cases import Shape, make_case, random_config, random_shape
from hipserve.testing.oracle import assert_as_exact, readable
from hipserve.types import BlockSelection


def in_tiles(rng: random.Random, shape: Shape, config: HiPConfig) -> tuple[Shape, HiPConfig]:
    """A similar configuration that the attention kernel for Hopper takes."""
    longest = max(shape.seq_lens)
    rows = [n if n == longest else q for n, q in zip(shape.seq_lens, shape.query_lens, strict=True)]
    group_size, head_dim = rng.choice([2, 3, 4, 7]), rng.choice([64, 128])
    shape = dataclasses.replace(
        shape, query_lens=tuple(rows), group_size=group_size, head_dim=head_dim, softcap=0.0
    )
    return shape, config.replace(query_block_size=64, key_block_size=16, share_group=True)


def later_windows(selection: BlockSelection, layout: BatchLayout, shift: int) -> BlockSelection:
    """The same blocks, with windows that start up to `shift` keys later, anywhere in a page."""
    position = layout.query_blocks(64)[:, 3]
    start = selection.window_start
    return BlockSelection(
        selection.indices, torch.minimum(start + shift, torch.maximum(position, start))
    )


def in_fp8(seed: int, shape: Shape) -> Shape:
    """The same with pages in fp8; scales that are powers of two leave the grid one."""
    rng = random.Random(f"fp8 {seed}")
    scaled = {"k_scale": rng.choice([1.0, 0.25]), "v_scale": rng.choice([1.0, 0.013, 7.0])}
    return dataclasses.replace(shape, page_dtype=rng.choice(FP8_DTYPES), **scaled)


def check_one(seed: int, fp8: bool = False) -> None:
    """Raises AssertionError where a random configuration differs from the definition."""
    rng = random.Random(seed)
    shape = random_shape(rng, (torch.bfloat16, torch.float16))
    config = random_config(rng, shape.page_size, shape.num_kv_heads)
    if seed % 2:
        shape, config = in_tiles(rng, shape, config)
    if shape.kind == "normal":
        shape = dataclasses.replace(shape, kind="grid")
    shape = in_fp8(seed, shape) if fp8 else shape
    case = make_case(shape, config.index_form)
    gpu = case.on("cuda")
    chosen = select_blocks(gpu.q, gpu.index, gpu.layout, config=config)
    host = BlockSelection(chosen.indices.cpu(), chosen.window_start.cpu())
    if shape.kind == "grid" or config.code_bits < 16:
        expected = select_blocks(
            case.q, case.index, case.layout, config=config, backend="reference"
        )
        assert torch.equal(host.indices, expected.indices), "selection differs"
        assert torch.equal(host.window_start, expected.window_start)
    choices: list[Any] = [(chosen, host), (None, None)]
    if seed % 2:
        shift = rng.randint(1, 15)
        later = later_windows(chosen, gpu.layout, shift)
        choices.append((later, BlockSelection(later.indices.cpu(), later.window_start.cpu())))
    for choice, mask in choices:
        out, lse = block_sparse_attention(
            gpu.q, gpu.pool, gpu.layout, choice, config=config, softcap=shape.softcap
        )
        assert_as_exact(out.cpu(), lse.cpu(), case, readable(case, mask, config))


def failure_of(seed: int, fp8: bool = False) -> str:
    """What is wrong with a configuration, if anything: a check reports it and goes on."""
    try:
        check_one(seed, fp8)
    except Exception as error:
        return f"check {seed} FAILED: {type(error).__name__}: {str(error)[:300]}"
    return ""


def check(
    seeds: Iterable[int], processes: int = 1, seconds: float = math.inf, *, fp8: bool = False
) -> bool:
    """Checks configurations, each with kernels of its own, until the time is over.

    Compiling them takes most of the time, so that several processes get further.

    fp8: they have pages in fp8.
    """
    began, done, failed = time.time(), 0, 0
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for complaint in pool.imap_unordered(functools.partial(failure_of, fp8=fp8), seeds):
            done += 1
            failed += bool(complaint)
            if complaint:
                say(complaint)
            if time.time() - began > seconds:
                say("out of time; the rest is unchecked")
                break  # leaving the pool ends its processes
    say(f"check: {done - failed} of {done} random configurations agree with the definition")
    return not failed
