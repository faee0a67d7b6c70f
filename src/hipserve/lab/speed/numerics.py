"""The gate: what is timed has to be right first, against float64 on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.errors import NumericsError
from hipserve.testing.oracle import Reading, bound, largest, output_band, read_by
from hipserve.types import BlockSelection


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: the largest error found, and what is allowed."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def require(checks: list[Check]) -> list[Check]:
    """The checks, if all passed.

    Raises:
        NumericsError: for the first that did not.
    """
    for check in checks:
        if not check.passed:
            raise NumericsError(
                f"{check.name}: error {check.error:.3g} where {check.allowed:.3g} is allowed; "
                "no speed is reported for wrong results"
            )
    return checks


def check_rows(
    name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keys: list[Tensor]
) -> Check:
    """Rows of attention against float64 over the same keys.

    The error may be twice that of plain torch in the same precision, plus its rounding band.

    Args:
        out, q: `[rows, num_q_heads, head_dim]`.
        k, v: `[kv_len, num_kv_heads, head_dim]`.
        positions: `[rows]`, of the rows; later keys are hidden.
        keys: positions that each of several equal ranges of query heads reads.
    """
    parts = list(_readings(q, k, v, positions, keys))
    truth, plain = (
        torch.cat([part.attend(dtype).out for part in parts], dim=1)
        for dtype in (torch.float64, q.dtype)
    )
    band = output_band(largest([part.scales() for part in parts]), q.dtype)
    return Check(name, *bound(out, plain, truth, band))


def _readings(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keys: list[Tensor]
) -> Iterator[Reading]:
    """One for each list of keys, with its heads and only its keys; `q` `[rows, ...]` as above."""
    group, heads = q.shape[1] // k.shape[1], q.shape[1] // len(keys)
    for i, read in enumerate(keys):
        mine = slice(i * heads, (i + 1) * heads)
        kv = slice(mine.start // group, -(-mine.stop // group))
        mask = (read <= positions[:, None]).expand(heads, -1, -1)
        yield Reading(q[:, mine], k[read, kv], v[read, kv], mask)


def check_equal(name: str, got: Tensor, expected: Tensor) -> Check:
    """Integers `[query_blocks, heads, blocks]` that must be equal; the error counts others."""
    same_shape = got.shape == expected.shape
    return Check(name, float((got != expected).sum()) if same_shape else float("inf"), 0.0)


def keys_read(selection: BlockSelection, i: int, last: int, config: HiPConfig) -> list[Tensor]:
    """For each row of the selection of query block i, the positions below `last` that it reads."""
    heads = range(selection.indices.shape[1])
    return [read_by(selection, i, head, last, config).nonzero()[:, 0] for head in heads]
