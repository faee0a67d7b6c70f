"""Attention from its definition: a boolean matrix of who reads whom, and a float64 softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import Case
from hipserve import HiPConfig
from hipserve.types import BlockSelection


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
    if selection is not None:
        for i, block in enumerate(case.layout.query_blocks(config.query_block_size).tolist()):
            _prune(case, masks, selection, config, i, block)
    return masks


def _prune(
    case: Case,
    masks: list[Tensor],
    selection: BlockSelection,
    config: HiPConfig,
    i: int,
    block: list[int],
) -> None:
    seq, _, num_rows, position = block
    n, query_len = case.shape.seq_lens[seq], case.shape.query_lens[seq]
    first = position - (n - query_len)
    size, keys = config.key_block_size, torch.arange(n)
    for head in range(masks[seq].shape[0]):
        row = head * selection.indices.shape[1] // masks[seq].shape[0]
        chosen = selection.indices[i, row]
        allowed = keys < config.num_sink_tokens
        allowed |= keys >= selection.window_start[i]
        allowed |= torch.isin(keys // size, chosen[chosen >= 0])
        masks[seq][head, first : first + num_rows] &= allowed


def attention(
    case: Case, masks: list[Tensor], dtype: torch.dtype, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Softmax attention over `masks`, weights and values in `dtype`; float64 gives the truth."""
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    start = 0
    group = case.shape.group_size
    for k, v, rows, mask in zip(case.ks, case.vs, case.shape.query_lens, masks, strict=True):
        q = case.q[start : start + rows].to(dtype).transpose(0, 1)
        start += rows
        kk, vv = (x.to(dtype).transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scores = q.to(wide) @ kk.to(wide).mT * case.q.shape[-1] ** -0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None])
        outs.append((weights.to(dtype) @ vv).transpose(0, 1))
        lses.append(lse.T)
    return torch.cat(outs), torch.cat(lses)


def assert_as_exact(out: Tensor, lse: Tensor, case: Case, masks: list[Tensor]) -> None:
    """The error against float64 is at most twice that of plain torch, plus its rounding band.

    The band is one rounding of the weighted sum in its own precision, at the scale of its terms,
    and what one float32 rounding of the scores, at theirs, does to it.
    """
    softcap, dtype = case.shape.softcap, case.q.dtype
    truth, true_lse = attention(case, masks, torch.float64, softcap)
    plain, plain_lse = attention(case, masks, dtype, softcap)
    score, total = magnitudes(case, masks, softcap)
    scores = torch.finfo(torch.float32).eps * max(score, softcap)
    _bounded(out, plain, truth, (torch.finfo(dtype).eps + scores) * total, "out")
    seen = ~true_lse.isinf()
    assert bool((lse.isinf() == ~seen).all()), "rows without keys have lse = -inf"
    if seen.any():
        # The sum of weights may be that of weights rounded to the dtype: log(1 + eps) is eps.
        logs = torch.finfo(torch.float32).eps * true_lse[seen].abs().max().item()
        band = torch.finfo(dtype).eps + logs + scores
        _bounded(lse[seen], plain_lse[seen], true_lse[seen], band, "lse")


def magnitudes(case: Case, masks: list[Tensor], softcap: float) -> tuple[float, float]:
    """The scales of what is rounded: the greatest |score| before a softcap, and sum of |w v|."""
    score, total, start = 0.0, 0.0, 0
    for k, v, rows, mask in zip(case.ks, case.vs, case.shape.query_lens, masks, strict=True):
        q = case.q[start : start + rows].float().transpose(0, 1)
        start += rows
        if not rows:
            continue
        group = case.shape.group_size
        kk, vv = (x.float().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        scores = (q @ kk.mT) * case.q.shape[-1] ** -0.5
        score = max(score, scores.abs().masked_fill(~mask, 0.0).max().item())
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
        total = max(total, (weights @ vv.abs()).max().item())
    return score, total


def _bounded(got: Tensor, plain: Tensor, truth: Tensor, band: float, what: str) -> None:
    assert bool(got.isfinite().all()), f"{what} is not finite: poison was read"
    error = (got.double() - truth).abs().max().item()
    allowed = 2 * (plain.double() - truth).abs().max().item() + band
    assert error <= allowed, f"{what}: error {error:.3g}, plain torch allows {allowed:.3g}"
