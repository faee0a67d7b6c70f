"""The gate: what is timed has to be right first, against float64 on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve.errors import NumericsError
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

    The error may be twice that of plain torch in the same precision, plus its rounding.

    Args:
        out, q: `[rows, num_q_heads, head_dim]`.
        k, v: `[kv_len, num_kv_heads, head_dim]`.
        positions: `[rows]`, of the rows; later keys are hidden.
        keys: positions that each of several equal ranges of query heads reads.
    """
    truth = _attention(q, k, v, positions, keys, torch.float64)
    plain = _attention(q, k, v, positions, keys, q.dtype)
    rounding = torch.finfo(q.dtype).eps * truth.abs().max().item()
    allowed = 2 * (plain.double() - truth).abs().max().item() + rounding
    return Check(name, (out.double() - truth).abs().max().item(), allowed)


def check_equal(name: str, got: Tensor, expected: Tensor) -> Check:
    """Integers that have to be the same; the error counts those that are not."""
    same_shape = got.shape == expected.shape
    return Check(name, float((got != expected).sum()) if same_shape else float("inf"), 0.0)


def keys_of(selection: BlockSelection, i: int, last: int, size: int, sinks: int) -> list[Tensor]:
    """For each head of query block i, the positions below `last` that it reads."""
    window = min(int(selection.window_start[i]), last)
    ends = [torch.arange(min(sinks, window)), torch.arange(window, last)]
    keys: list[Tensor] = []
    for blocks in selection.indices[i].long():
        chosen = blocks[blocks >= 0, None] * size + torch.arange(size)
        keys.append(torch.cat([ends[0], chosen.flatten(), ends[1]]))
    return keys


def _attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keys: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """Softmax attention by definition, scores in float32 at least, weights in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=dtype)
    heads_per_list, group = q.shape[1] // len(keys), q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        read = keys[head // heads_per_list]
        kk, vv = k[read, head // group], v[read, head // group]
        scores = q[:, head].to(wide) @ kk.to(wide).T * q.shape[2] ** -0.5
        weights = scores.masked_fill(read > positions[:, None], -torch.inf).softmax(dim=1)
        out[:, head] = weights.to(dtype) @ vv.to(dtype)
    return out
