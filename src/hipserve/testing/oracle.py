"""Attention from its definition: a boolean matrix of who reads whom, and a float64 softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.testing.cases import Case
from hipserve.types import BlockSelection


class Attended(NamedTuple):
    """`out` `[rows, num_q_heads, head_dim]` and `lse` `[rows, num_q_heads]`, natural log."""

    out: Tensor
    lse: Tensor


class Scales(NamedTuple):
    """What is rounded: the maximum of |score| before a softcap, and of the sum of |weight v|."""

    score: float
    total: float


class Bound(NamedTuple):
    """The error that was found, and the one that is allowed."""

    error: float
    allowed: float


class Reading(NamedTuple):
    """Rows, keys and values, and which row reads which key.

    q: `[rows, num_q_heads, head_dim]`.
    k, v: `[kv_len, num_kv_heads, head_dim]`.
    mask: `[num_q_heads, rows, kv_len]`, True where a row reads a key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor

    def attend(self, dtype: torch.dtype, softcap: float = 0.0) -> Attended:
        """Softmax attention, weights and values in `dtype`; float64 gives the truth."""
        q, k, v = self._heads(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scores = q.to(wide) @ k.to(wide).mT * self.q.shape[-1] ** -0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~self.mask, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None]).to(dtype)
        # Sums of float16 are those of float32, rounded; torch takes ten times as long for them.
        summed = torch.float32 if dtype == torch.float16 else dtype
        out = (weights.to(summed) @ v.to(summed)).to(dtype)
        return Attended(out.transpose(0, 1), lse.T)

    def scales(self, softcap: float = 0.0) -> Scales:
        if not len(self.q):
            return Scales(0.0, 0.0)
        q, k, v = self._heads(torch.float32)
        scores = (q @ k.mT) * self.q.shape[-1] ** -0.5
        score = scores.abs().masked_fill(~self.mask, 0.0).max().item()
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~self.mask, -torch.inf).softmax(-1).nan_to_num()
        return Scales(score, (weights @ v.abs()).max().item())

    def _heads(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """`q k v`, each `[num_q_heads, rows or kv_len, head_dim]`."""
        group = self.q.shape[1] // self.k.shape[1]
        q, k, v = (x.to(dtype).transpose(0, 1) for x in (self.q, self.k, self.v))
        return q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)


def read_by(
    selection: BlockSelection, block: int, row: int, kv_len: int, config: HiPConfig
) -> Tensor:
    """`[kv_len]` bool: what row `row` of the selection of query block `block` may read, if visible.

    Sinks, chosen blocks and the window.
    """
    keys, chosen = torch.arange(kv_len), selection.indices[block, row]
    allowed = keys < config.num_sink_tokens
    allowed |= keys >= selection.window_start[block]
    return allowed | torch.isin(keys // config.key_block_size, chosen[chosen >= 0])


def readable(
    case: Case, selection: BlockSelection | None, config: HiPConfig, sliding_window: int = 0
) -> list[Tensor]:
    """For each sequence `[num_q_heads, query_len, seq_len]`: row reads key."""
    num_q_heads = case.q.shape[1]
    masks: list[Tensor] = []
    for n, rows in zip(case.shape.seq_lens, case.shape.query_lens, strict=True):
        keys, positions = torch.arange(n), torch.arange(n - rows, n)[:, None]
        mask = keys <= positions
        if sliding_window:
            mask &= keys > positions - sliding_window
        masks.append(mask.expand(num_q_heads, -1, -1).clone())
    if selection is None:
        return masks
    for i, block in enumerate(case.layout.query_blocks(config.query_block_size).tolist()):
        seq, _, num_rows, position = block
        n, query_len = case.shape.seq_lens[seq], case.shape.query_lens[seq]
        first = position - (n - query_len)
        for head in range(num_q_heads):
            row = head * selection.indices.shape[1] // num_q_heads
            allowed = read_by(selection, i, row, n, config)
            masks[seq][head, first : first + num_rows] &= allowed
    return masks


def readings(case: Case, masks: list[Tensor]) -> list[Reading]:
    """The rows of every sequence; `masks` are those of `readable`, `[heads, rows, kv_len]`."""
    parts = case.q.split(list(case.shape.query_lens))
    pairs = zip(parts, case.ks, case.vs, masks, strict=True)
    return [Reading(q, k, v, mask) for q, k, v, mask in pairs]


def attention(
    case: Case, masks: list[Tensor], dtype: torch.dtype, softcap: float = 0.0
) -> Attended:
    """The rows of all sequences in turn; `masks` are those of `readable`, `[heads, rows, keys]`."""
    parts = [reading.attend(dtype, softcap) for reading in readings(case, masks)]
    return Attended(torch.cat([x.out for x in parts]), torch.cat([x.lse for x in parts]))


def magnitudes(case: Case, masks: list[Tensor], softcap: float) -> Scales:
    """The scales of all sequences; `masks` are those of `readable`, `[heads, rows, keys]`."""
    return largest([reading.scales(softcap) for reading in readings(case, masks)])


def largest(scales: list[Scales]) -> Scales:
    return Scales(max(x.score for x in scales), max(x.total for x in scales))


def output_band(scales: Scales, dtype: torch.dtype, softcap: float = 0.0) -> float:
    """What roundings may change of `out` beyond what plain torch shows.

    One rounding of the weighted sum in its own precision, at the scale of its terms, and what one
    float32 rounding of the scores, at theirs, does to it.
    """
    return (torch.finfo(dtype).eps + score_band(scales, softcap)) * scales.total


def score_band(scales: Scales, softcap: float = 0.0) -> float:
    """One float32 rounding of the scores."""
    return torch.finfo(torch.float32).eps * max(scales.score, softcap)


def bound(got: Tensor, plain: Tensor, truth: Tensor, band: float) -> Bound:
    """The error against float64 may be twice that of plain torch, plus a band.

    got, plain, truth: of one shape, `[rows, num_q_heads, head_dim]` or `[rows, num_q_heads]`.
    """
    error = (got.double() - truth).abs().max().item()
    return Bound(error, 2 * (plain.double() - truth).abs().max().item() + band)


def assert_as_exact(out: Tensor, lse: Tensor, case: Case, masks: list[Tensor]) -> None:
    """The error against float64 is at most twice that of plain torch, plus its rounding band.

    out, lse: `[rows, num_q_heads, head_dim]` and `[rows, num_q_heads]`.
    masks: of `readable`, `[num_q_heads, rows, kv_len]` each.
    """
    softcap, dtype = case.shape.softcap, case.q.dtype
    truth, true_lse = attention(case, masks, torch.float64, softcap)
    plain, plain_lse = attention(case, masks, dtype, softcap)
    scales = magnitudes(case, masks, softcap)
    assert_bounded(out, plain, truth, output_band(scales, dtype, softcap), "out")
    seen = ~true_lse.isinf()
    assert bool((lse.isinf() == ~seen).all()), "rows without keys have lse = -inf"
    if seen.any():
        # The sum of weights may be that of weights rounded to the dtype: log(1 + eps) is eps.
        logs = torch.finfo(torch.float32).eps * true_lse[seen].abs().max().item()
        band = torch.finfo(dtype).eps + logs + score_band(scales, softcap)
        assert_bounded(lse[seen], plain_lse[seen], true_lse[seen], band, "lse")


def assert_bounded(got: Tensor, plain: Tensor, truth: Tensor, band: float, what: str) -> None:
    """`bound`, as an assertion that says `what`; the tensors are `[rows, ...]` of one shape."""
    assert bool(got.isfinite().all()), f"{what} is not finite: poison was read"
    error, allowed = bound(got, plain, truth, band)
    assert error <= allowed, f"{what}: error {error:.3g}, plain torch allows {allowed:.3g}"
