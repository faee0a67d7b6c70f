"""Scores of query rows with keys and with runs of keys, from an index of one sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve.ops.codes import QUERY_BITS, REACH_STEPS, encode, encode_rotated, unpack
from hipserve.ops.rope import turn
from hipserve.types import KeyIndex


@dataclass(frozen=True, slots=True)
class IndexedKeys:
    """The index of one sequence's keys.

    Attributes:
        index: of all pages.
        pages: `[max_pages]` int64, the pages of the sequence.
    """

    index: KeyIndex
    pages: Tensor

    def locate(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Page and slot of the positions `keys` `[heads, count]`, like it."""
        page_size = self.index.page_size
        return self.pages[keys // page_size], keys % page_size


class Scores:
    """Exact scores: codes are the keys themselves."""

    def __init__(self, rows: Tensor, keys: IndexedKeys) -> None:
        """rows: `[heads, rows, head_dim]`."""
        self.keys, self.index, self.dtype = keys, keys.index, rows.dtype
        group = rows.shape[0] // keys.index.num_kv_heads
        self.kv_heads = torch.arange(rows.shape[0], device=rows.device)[:, None] // group
        self.rows = rows if rows.dtype == torch.float64 else rows.float()

    def of_keys(self, keys: Tensor) -> Tensor:
        """`[heads, rows, count]`: q.k of each row with `keys` `[heads, count]`."""
        return (
            self.rows
            @ self.index.codes[*self.keys.locate(keys), self.kv_heads].to(self.rows.dtype).mT
        )

    def of_runs(self, page: Tensor, run: Tensor, reach: float) -> Tensor:
        """`[heads, rows, count]`: a score of each run from its summary; page, run `[heads, count]`.

        q.center + reach * |q|.radius: what a key scores that lies so many radii from the center in
        every channel, on the side that is good for q. The rows are weighted in their own dtype.
        """
        assert self.index.summaries is not None
        summaries = self.index.summaries[page, run, self.kv_heads]
        center, radius = summaries.to(self.rows.dtype).unbind(2)
        reached = (reach * self.rows.abs()).to(self.dtype).to(self.rows.dtype)
        return self.rows @ center.mT + reached @ radius.mT


class CodeScores(Scores):
    """Scores of short codes: sums of products of integers, times scales.

    Everything is exact in float32 but the sum of a run's two parts, which rounds once: every
    backend finds the same scores.
    """

    def __init__(self, rows: Tensor, keys: IndexedKeys) -> None:
        """rows: `[heads, rows, head_dim]`."""
        super().__init__(rows.float(), keys)
        self.plain, self.rotated = encode(rows, QUERY_BITS), encode_rotated(rows)

    def of_keys(self, keys: Tensor) -> Tensor:
        """`[heads, rows, count]`: as of exact keys."""
        index, at = self.index, (*self.keys.locate(keys), self.kv_heads)
        assert index.code_scales is not None
        sums = self.rotated.numbers @ unpack(index.codes[at], index.code_bits).mT
        scale = self.rotated.scales[..., None]
        return scale * (index.code_scales[at].float()[:, None] * sums)

    def of_runs(self, page: Tensor, run: Tensor, reach: float) -> Tensor:
        """`[heads, rows, count]`: as of exact summaries."""
        index, at = self.index, (page, run, self.kv_heads)
        assert index.summaries is not None
        assert index.summary_scales is not None
        center, radius = index.summaries[at].float().unbind(2)
        scales = index.summary_scales[at].float()[:, None]
        steps = round(reach * REACH_STEPS)
        reached = torch.floor((steps * self.plain.numbers.abs() + REACH_STEPS // 2) / REACH_STEPS)
        near = scales[..., 0] * (self.plain.numbers @ center.mT)
        far = scales[..., 1] * (reached @ radius.mT)
        return self.plain.scales[..., None] * (near + far)


class SeenKeys:
    """Scores of one query block, which sees the keys of far segments nearer than they are.

    Keys before `nearest` are seen, segment by segment, as if their segment began there
    (`hipserve.ops.rope.nearest_segment`). To see keys later is to turn the query back.
    """

    def __init__(
        self,
        rows: Tensor,
        keys: IndexedKeys,
        rope: Tensor | None = None,
        nearest: int = 0,
        segment: int = 1,
    ) -> None:
        """rows: `[heads, rows, head_dim]`, sampled; rope: `[2, head_dim]`, where `nearest` is not
        0."""
        self.rows, self.keys, self.rope = rows, keys, rope
        self.nearest, self.segment = nearest, segment
        self._scores: dict[int, Scores] = {}

    def each(self, positions: Tensor, score: Callable[[Scores], Tensor]) -> Tensor:
        """`[heads, rows, count]`: score(...) of what begins at `positions` `[heads, count]`, each
        with the queries that see it."""
        shifts = (self.nearest - positions // self.segment * self.segment).clamp(min=0)
        out, *others = [
            score(self._seen(shift)).masked_fill((shifts != shift)[:, None], -torch.inf)
            for shift in shifts.unique().tolist()
        ] or [score(self._seen(0))]
        for other in others:
            out = torch.maximum(out, other)
        return out

    def _seen(self, shift: int) -> Scores:
        if shift not in self._scores:
            rows = self.rows if self.rope is None else turn(self.rows, -shift, self.rope)
            kind = Scores if self.keys.index.code_scales is None else CodeScores
            self._scores[shift] = kind(rows, self.keys)
        return self._scores[shift]
