"""Random configurations of writing, selection and attention on every backend and ISA tier.

`HIPSERVE_FUZZ=2000` (`make fuzz`) runs that many, `HIPSERVE_FUZZ=@1234` the one with that seed.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from backends import NAMES, using
from hipserve import HiPConfig
from hipserve.ops import block_sparse_attention, select_blocks
from hipserve.plan import BatchLayout
from hipserve.testing.cases import (
    Case,
    Pages,
    Shape,
    in_pages,
    make_case,
    random_config,
    random_shape,
)
from hipserve.testing.laws import assert_lawful
from hipserve.testing.oracle import assert_as_exact, readable
from hipserve.types import BlockSelection

DEFAULT = 150
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def seeds() -> list[int]:
    wanted = os.environ.get("HIPSERVE_FUZZ", str(DEFAULT))
    return [int(wanted[1:])] if wanted.startswith("@") else list(range(int(wanted)))


def draw(seed: int) -> tuple[Shape, HiPConfig]:
    """A small batch; every third has values whose sums are exact, to compare index for index."""
    rng = random.Random(seed)
    shape = random_shape(rng, DTYPES)
    config = random_config(rng, shape.page_size, shape.num_kv_heads)
    rows = tuple(min(n, 12 * config.query_block_size) for n in shape.query_lens)
    kind = "grid" if seed % 3 == 0 else shape.kind
    return replace(shape, query_lens=rows, kind=kind), config


@dataclass
class Run:
    """What one backend makes of a configuration."""

    case: Case
    selection: BlockSelection
    out: Tensor
    lse: Tensor


def run(shape: Shape, config: HiPConfig, backend: str) -> Run:
    case = make_case(shape, config.index_form, backend)
    selection, out, lse = attend(case.q, case.kv, case.layout, shape, config, backend)
    return Run(case, selection, out, lse)


def attend(
    q: Tensor, kv: Pages, layout: BatchLayout, shape: Shape, config: HiPConfig, backend: str
) -> tuple[BlockSelection, Tensor, Tensor]:
    selection = select_blocks(q, kv.index, layout, config=config, backend=backend)
    options = {"config": config, "softcap": shape.softcap, "backend": backend}
    return selection, *block_sparse_attention(q, kv.pool, layout, selection, **options)


def check(shape: Shape, config: HiPConfig, backend: str, reference: Run) -> None:
    """Exact pages and bounds, a lawful selection, exact attention, and no trace of page order."""
    got = reference if backend == "reference" else run(shape, config, backend)
    for pair in zip(got.case.kv.tensors, reference.case.kv.tensors, strict=True):
        assert torch.equal(*(x.nan_to_num(7.0) for x in pair))
    assert_lawful(got.selection, got.case, config)
    if shape.kind == "grid":
        assert torch.equal(got.selection.indices, reference.selection.indices)
    assert_as_exact(got.out, got.lse, got.case, readable(got.case, got.selection, config))
    case = got.case
    pages = in_pages(case.ks, case.vs, shape, config.index_form, page_seed=shape.seed + 1)
    selection, out, lse = attend(case.q, *pages, shape, config, backend)
    assert torch.equal(selection.indices, got.selection.indices)
    assert torch.equal(out, got.out)
    assert torch.equal(lse, got.lse)


@pytest.mark.parametrize("seed", seeds())
def test_configuration(seed: int) -> None:
    shape, config = draw(seed)
    reference = run(shape, config, "reference")
    for backend in NAMES:
        try:
            with using(backend) as name:
                check(shape, config, name, reference)
        except Exception as error:
            pytest.fail(
                f"{backend}: {error}\n{shape}\n{config}\n"
                f"reproduce: HIPSERVE_FUZZ=@{seed} python -m pytest tests/test_fuzz.py"
            )
