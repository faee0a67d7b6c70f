"""Which rows of a packed batch belong to which sequence, and what its query blocks are."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from hipserve.plan.rule import PruningRule

Lengths = tuple[Sequence[int], Sequence[int]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Which rows of a packed batch belong to which sequence, and where its pages are.

    Attributes:
        block_table: `[num_seqs, max_pages]` int32, page ids of each sequence in order.
        seq_lens: `[num_seqs]` int32, keys of each sequence including those of this call.
        cu_seqlens_q: `[num_seqs + 1]` int32, where each sequence's query rows start. The rows are
            the last positions of their sequence.
        lengths: `seq_lens` and `cu_seqlens_q` as numbers, where the host knows them.
    """

    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    lengths: Lengths | None = field(default=None, repr=False)
    _made: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False, compare=False)

    @classmethod
    def of(
        cls, block_table: Tensor, seq_lens: Sequence[int], query_lens: Sequence[int]
    ) -> BatchLayout:
        """The layout of lengths that the host knows: nothing is read back from the device.

        block_table: `[num_seqs, max_pages]` int32.
        """
        make = _of_lengths.__wrapped__ if torch.compiler.is_compiling() else _of_lengths
        return cls(block_table, *make(tuple(seq_lens), tuple(query_lens), block_table.device))

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def keys_visible(self) -> int | None:
        """Keys that dense attention reads for all rows, where the host knows the lengths."""
        if self.lengths is None:
            return None
        seq_lens, starts = self.lengths
        rows = [end - begin for begin, end in itertools.pairwise(starts)]
        return sum(n * (2 * end - n + 1) // 2 for n, end in zip(rows, seq_lens, strict=True))

    def decodes(self, num_tokens: int) -> bool:
        """Every sequence has exactly one row; without host lengths, as many rows as sequences."""
        if self.lengths is None:
            return num_tokens == self.num_seqs
        return all(i == start for i, start in enumerate(self.lengths[1]))

    def may_prune(self, rule: PruningRule) -> bool:
        """False only where the host knows that every query block reads all of its keys."""
        if self.lengths is None:
            return True
        if torch.compiler.is_compiling():
            return self._prunes(*self.lengths, rule)
        asked = ("may_prune", rule)
        if asked not in self._made:
            self._made[asked] = self._prunes(*self.lengths, rule)
        return self._made[asked]

    def reaches(self, position: int) -> bool:
        """False only where the host knows that every row lies before `position`."""
        return self.lengths is None or max(self.lengths[0], default=0) > position

    @staticmethod
    def _prunes(seq_lens: Sequence[int], starts: Sequence[int], rule: PruningRule) -> bool:
        rows = (end - begin for begin, end in itertools.pairwise(starts))
        return any(
            rule.prunes(n - 1, min(r, rule.query_block_size))
            for n, r in zip(seq_lens, rows, strict=True)
            if r
        )

    def query_blocks(self, query_block_size: int) -> Tensor:
        """`[num_query_blocks, 4]` int32: sequence, first row, number of rows, first position.

        Blocks are aligned on absolute positions, so a prompt that is cut into chunks at multiples
        of `query_block_size` has the same blocks as the whole.
        """
        if query_block_size not in self._made:
            lengths = self.lengths or (self.seq_lens.tolist(), self.cu_seqlens_q.tolist())
            blocks = split_rows(*lengths, query_block_size)
            self._made[query_block_size] = blocks.to(self.seq_lens.device)
        return self._made[query_block_size]

    def host_blocks(self, query_block_size: int) -> list[list[int]]:
        """`query_blocks` on the host; nothing is read back where it knows the lengths."""

        def make() -> list[list[int]]:
            lengths = self.lengths or (self.seq_lens.tolist(), self.cu_seqlens_q.tolist())
            return split_rows(*lengths, query_block_size).tolist()

        return self.once(("host blocks", query_block_size), make)

    def once(self, asked: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns: made once for all layers of a step, whose layouts are alike."""
        if asked not in self._made:
            self._made[asked] = make()
        return self._made[asked]

    def window_starts(self, rule: PruningRule) -> Tensor:
        """`[num_query_blocks]` int32: first key of each query block's window."""
        blocks = self.query_blocks(rule.query_block_size)
        if torch.compiler.is_compiling():
            return rule.window_start(blocks[:, 3], blocks[:, 2])
        if rule not in self._made:
            self._made[rule] = rule.window_start(blocks[:, 3], blocks[:, 2])
        return self._made[rule]

    def behind(self, position: int, query_block_size: int) -> BatchLayout:
        """The same batch without the query blocks that start before `position`."""
        asked = ("behind", position, query_block_size)
        if asked not in self._made:
            blocks = self.query_blocks(query_block_size)
            left = blocks[blocks[:, 3] >= position]
            self._made[asked] = replace(self, _made={query_block_size: left})
        return self._made[asked]

    def only(self, query_block_size: int, chosen: Tensor) -> BatchLayout:
        """The same batch, of which `select_blocks` sees only some query blocks.

        chosen: `[num_chosen]` int64, indices of query blocks.
        """
        blocks = self.query_blocks(query_block_size)[chosen]
        return replace(self, lengths=None, _made={query_block_size: blocks})


@functools.lru_cache(16)
def _of_lengths(
    seq_lens: tuple[int, ...], query_lens: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Lengths, dict[Any, Any]]:
    """What a layout has besides its pages: all layers of a step share it."""
    starts = (0, *itertools.accumulate(query_lens))
    ends, begins = (
        torch.tensor(values, dtype=torch.int32, device=device) for values in (seq_lens, starts)
    )
    return ends, begins, (seq_lens, starts), {}


def split_rows(seq_lens: Sequence[int], starts: Sequence[int], size: int) -> Tensor:
    """`BatchLayout.query_blocks`, `[num_query_blocks, 4]` int32 on the CPU, of known lengths."""
    blocks: list[list[int]] = []
    for seq, (seq_len, begin, end) in enumerate(
        zip(seq_lens, starts[:-1], starts[1:], strict=True)
    ):
        first = seq_len - (end - begin)
        position = first
        while position < seq_len:
            stop = min((position // size + 1) * size, seq_len)
            blocks.append([seq, begin + position - first, stop - position, position])
            position = stop
    return torch.tensor(blocks, dtype=torch.int32).reshape(-1, 4)
