"""How often a representative points to the right half of a range, measured and predicted.

A range of keys is cut in two; each half is judged by the score of one key of it, or by the mean of
its scores. The choice is right where that half holds the maximum score of the range.
"""

from __future__ import annotations

import torch
from torch import Tensor

REPRESENTATIVES = ("first", "middle", "last", "random", "mean")
Shares = dict[str, float]
SIZES = (16, 64, 256)
"""Keys of ranges."""

LAGS = (1, 4, 16, 64, 255)
"""Distances of keys at which correlation is shown."""


def split_shares(scores: Tensor, size: int, seed: int = 0) -> Shares:
    """The share of ranges that each representative splits right.

    scores: `[rows, keys]`; ranges of `size` keys, an even number, from the first key on.
    """
    ranges = scores[:, : scores.shape[1] // size * size].unflatten(1, (-1, 2, size // 2))
    best = ranges.amax(-1).argmax(-1)
    return {
        name: float((_stand_in(ranges, name, seed).argmax(-1) == best).double().mean())
        for name in REPRESENTATIVES
    }


def _stand_in(ranges: Tensor, name: str, seed: int) -> Tensor:
    """`[rows, ranges, 2]`: the score that stands for each half of `[rows, ranges, 2, half]`."""
    half = ranges.shape[-1]
    match name:
        case "mean":
            return ranges.mean(-1)
        case "random":
            numbers = torch.Generator().manual_seed(seed)
            at = torch.randint(half, (*ranges.shape[:-1], 1), generator=numbers)
            return ranges.gather(-1, at.to(ranges.device))[..., 0]
        case _:
            return ranges[..., {"first": 0, "middle": half // 2, "last": half - 1}[name]]


def correlation(scores: Tensor, lags: int) -> Tensor:
    """`[lags]` float64: the correlation of scores at distances 0, 1, …, mean over rows.

    scores: `[rows, keys]`, whose rows count by their variance.
    """
    rows = scores.double() - scores.double().mean(1, keepdim=True)
    keys = rows.shape[1]
    spectrum = torch.fft.rfft(rows, n=2 * keys)
    sums = torch.fft.irfft(spectrum * spectrum.conj(), n=2 * keys)[:, :lags].sum(0)
    return sums / (keys - torch.arange(lags, device=sums.device)) / (sums[0] / keys)


def predict_shares(rho: Tensor, size: int, *, ranges: int = 4000, seed: int = 0) -> Shares:
    """`split_shares` of Gaussian scores whose correlation is `rho` `[lags]`, and nothing else.

    Simulated on so many ranges; the standard error is 0.008 with 4,000.
    """
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    values, vectors = torch.linalg.eigh(rho.cpu().double()[distance])
    root = vectors * values.clamp(min=0).sqrt()
    numbers = torch.Generator().manual_seed(seed)
    noise = torch.randn(ranges, size, generator=numbers, dtype=torch.float64)
    return split_shares(noise @ root.T, size, seed)
