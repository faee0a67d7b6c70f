"""One decode step of a whole layer at the end of a long context: checks and contenders.

Queries differ from step to step, and the caches are swept before every call, as if other layers
had run: keys and values come from memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hipserve.attention import AttentionLayer, HeldKeys, SelectionReuse
from hipserve.attention.crossover import rule_of
from hipserve.cache.store import empty_pages
from hipserve.config import HiPConfig
from hipserve.lab.speed.inputs import LayerShape, make_decode
from hipserve.lab.speed.numerics import Check, check_rows, keys_read
from hipserve.lab.speed.timing import Contender, fastest
from hipserve.ops import block_sparse_attention, join_runs, select_blocks, write_kv
from hipserve.plan import BatchLayout
from hipserve.types import BlockSelection, KeyIndex, KeyPool

NUM_QUERIES = 32
"""Different queries, one after the other."""

PAGE_SIZE = 256


class Decode:
    """Steps `refresh_interval` - 1 before the end of `length` keys up to the end, again and again.

    A step writes its key and value and attends with q `[1, num_q_heads, head_dim]`.
    """

    def __init__(
        self, shape: LayerShape, length: int, dtype: torch.dtype, config: HiPConfig, backend: str
    ) -> None:
        self.shape, self.length, self.backend = shape, length, backend
        inputs = make_decode(shape, length, NUM_QUERIES, dtype)
        self.q, self.k, self.v = inputs.q, inputs.k, inputs.v
        self.config, self.rule = config, rule_of(config, self.q, shape.num_kv_heads)
        self.options: dict[str, Any] = {"config": config, "backend": backend, "check": False}
        self.cycle = min(config.refresh_interval, length)
        self.layouts = [self._layout(length - self.cycle + 1 + i) for i in range(self.cycle)]
        self.pool, self.index = self._pages()
        self.reuse = SelectionReuse()
        self.selections: dict[int, BlockSelection] = {}

    def _layout(self, seq_len: int) -> BatchLayout:
        """Made once for all layers of a model's step, so its making is not timed."""
        pages = torch.arange(-(-self.length // PAGE_SIZE), dtype=torch.int32)[None]
        layout = BatchLayout.of(pages, [seq_len], [1])
        layout.window_starts(self.rule)
        return layout

    def _pages(self) -> tuple[KeyPool, KeyIndex]:
        count = -(-self.length // PAGE_SIZE)
        pages = empty_pages(count, PAGE_SIZE, self.config.index_form, self.k)
        self._write(pages, 0, self.length)
        join_runs(pages[1], self.layouts[-1].block_table, [self.length])
        return pages

    def _write(self, pages: tuple[KeyPool, KeyIndex], first: int, end: int) -> None:
        k, v, slots = self.k[first:end], self.v[first:end], torch.arange(first, end)
        write_kv(k, v, *pages, slots, backend=self.backend, check=False)

    @property
    def reads_all(self) -> bool:
        """HiP is the dense path: no step is pruned."""
        return not self.layouts[-1].may_prune(self.rule)

    def query(self, turn: int) -> Tensor:
        i = turn % NUM_QUERIES
        return self.q[i : i + 1]

    def step(self, turn: int, reuse: SelectionReuse | None) -> Tensor:
        """Writes one key and value and attends, selecting where `reuse` holds no selection."""
        layout = self.layouts[turn % self.cycle]
        last = self.length - self.cycle + turn % self.cycle
        self._write((self.pool, self.index), last, last + 1)
        if reuse and turn % self.cycle == 0:
            reuse.clear()
        layer = AttentionLayer(self.config, self.rule, backend=self.backend, selections=reuse)
        return layer.forward(self.query(turn), HeldKeys(self.pool, self.index, layout))[0]

    def select(self, turn: int) -> BlockSelection:
        self.selections[turn] = select_blocks(
            self.query(turn), self.index, self.layouts[-1], rule=self.rule, **self.options
        )
        return self.selections[turn]

    def attend(self, turn: int, selection: BlockSelection | None) -> Tensor:
        operation, layout = block_sparse_attention, self.layouts[-1]
        return operation(self.query(turn), self.pool, layout, selection, **self.options)[0]

    def contenders(self) -> dict[str, Contender]:
        """Steps that select, steps that mostly reuse, and dense ones; SDPA's keys are its own."""
        reused = {"hip reused": Contender(lambda turn: self.step(turn, self.reuse))}
        return {
            "hip": Contender(lambda turn: self.step(turn, None)),
            **(reused if self.cycle > 1 else {}),
            "dense": Contender(lambda turn: self.attend(turn, None)),
            "sdpa": Contender(self.sdpa()),
            "select": Contender(self.select),
            "attend": Contender(lambda turn: self.attend(turn, self.selections[turn])),
        }

    def sdpa(self) -> Callable[[int], Tensor]:
        """A step of torch's SDPA, called in the way that is the fastest here."""
        heads, group, dim = self.shape.num_kv_heads, self.shape.group_size, self.shape.head_dim
        k, v = (x.transpose(0, 1).contiguous()[None] for x in (self.k, self.v))

        def folded(turn: int) -> Tensor:
            q = self.query(turn).view(1, heads, group, dim)
            return F.scaled_dot_product_attention(q, k, v)

        def grouped(turn: int) -> Tensor:
            q = self.query(turn).view(1, heads * group, 1, dim)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        ways = {"folded": folded, "grouped": grouped}
        name = fastest({name: functools.partial(way, 0) for name, way in ways.items()})
        return ways[name]

    def checks(self) -> list[Check]:
        turn = self.cycle - 1
        q, kv, positions = self.query(turn), (self.k, self.v), torch.tensor([self.length - 1])
        everything = [torch.arange(self.length)]
        pruned = self.layouts[-1].may_prune(self.rule)
        keys = keys_read(self.select(turn), 0, self.length, self.config) if pruned else everything
        sparse, dense = self.step(turn, None), self.attend(turn, None)
        name = f"decode at {self.length}, attention over the chosen keys"
        return [
            check_rows(name, sparse, q, *kv, positions=positions, keys=keys),
            check_rows(
                f"decode at {self.length}, dense attention",
                dense,
                q,
                *kv,
                positions=positions,
                keys=everything,
            ),
        ]
