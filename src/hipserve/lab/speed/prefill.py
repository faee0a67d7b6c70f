"""Prefill of one GQA group, or of a whole layer where it is short: checks and contenders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hipserve.attention.crossover import rule_of
from hipserve.attention.dense import attend_chosen
from hipserve.attention.hip import hip_attention, whole_sequences
from hipserve.config import HiPConfig
from hipserve.lab.speed.inputs import LayerShape, make_prefill, on_grid
from hipserve.lab.speed.numerics import Check, check_equal, check_rows, keys_read
from hipserve.lab.speed.timing import Contender, fastest
from hipserve.ops import block_sparse_attention, build_index, select_blocks
from hipserve.plan import BatchLayout
from hipserve.types import BlockSelection, KeyIndex, KeyPool

CHECKED_BLOCKS = 4
"""Query blocks of the timed call whose rows are compared to float64."""

GRID_BLOCKS = 2
"""Query blocks at the end whose selection is compared to the definition."""

DENSE_ROWS = 16
"""Rows at the end whose dense attention is compared to float64."""

WHOLE_LAYER = 1024
"""Tokens up to which all heads run; of more, one GQA group, since work is linear in groups."""

WARM_UP = 2048
"""Tokens that warm up the dense kernels: their tiles are those of longer prompts."""


class Prefill:
    """One length: `q` `[length, num_q_heads, head_dim]` of some groups against their KV heads."""

    def __init__(
        self, shape: LayerShape, length: int, dtype: torch.dtype, config: HiPConfig, backend: str
    ) -> None:
        self.shape, self.length, self.backend = shape, length, backend
        self.kv_heads = shape.num_kv_heads if length <= WHOLE_LAYER else 1
        inputs = make_prefill(shape, length, dtype, self.kv_heads)
        self.q, self.k, self.v = inputs.q, inputs.k[None], inputs.v[None]
        self.config, self.rule = config, rule_of(config, self.q, self.kv_heads)
        self.options: dict[str, Any] = {"config": config, "backend": backend, "check": False}

    @functools.cached_property
    def layout(self) -> BatchLayout:
        return whole_sequences(1, self.length, self.length, self.q.device)

    @property
    def reads_all(self) -> bool:
        """HiP is the dense path: no query block is pruned."""
        return not self.layout.may_prune(self.rule)

    @functools.cached_property
    def index(self) -> KeyIndex:
        return self.build()

    @property
    def pool(self) -> KeyPool:
        return KeyPool(self.k, self.v)

    @functools.cached_property
    def selection(self) -> BlockSelection:
        return self.select()

    def hip(self) -> Tensor:
        options: dict[str, Any] = {"config": self.config, "backend": self.backend}
        return hip_attention(self.q[None], self.k, self.v, **options)[0]

    def build(self) -> KeyIndex:
        """What `hip_attention` builds in every call."""
        return build_index(self.k, **self.config.index_form._asdict(), backend=self.backend)

    def select(self) -> BlockSelection:
        return select_blocks(self.q, self.index, self.layout, rule=self.rule, **self.options)

    def attend(self, selection: BlockSelection) -> Tensor:
        options: dict[str, Any] = {"config": self.config, "backend": self.backend}
        return attend_chosen(self.q, self.pool, self.layout, selection, **options)[0]

    def contenders(self) -> dict[str, Contender]:
        """Our operation whole and in its parts, our dense kernel, and torch's SDPA, which gets as
        many heads, laid out for it.
        """
        scale, layout = self.shape.num_kv_heads / self.kv_heads, self.layout
        short = whole_sequences(1, min(self.length, WARM_UP), self.length, self.q.device)
        sdpa = self.sdpa()
        return {
            "hip": Contender(lambda _: self.hip(), scale),
            "dense": Contender(
                lambda _: self.dense(self.q, layout),
                scale,
                lambda _: self.dense(self.q[:WARM_UP], short),
            ),
            "sdpa": Contender(
                lambda _: sdpa(self.length), scale, lambda _: sdpa(min(self.length, WARM_UP))
            ),
            "index": Contender(lambda _: self.build(), scale),
            "select": Contender(lambda _: self.select(), scale),
            "attend": Contender(lambda _: self.attend(self.selection), scale),
        }

    def dense(self, q: Tensor, layout: BatchLayout) -> Tensor:
        """The last rows `q` `[rows, num_q_heads, head_dim]` against all keys before them."""
        return block_sparse_attention(q, self.pool, layout, None, **self.options)[0]

    def sdpa(self) -> Callable[[int], Tensor]:
        """Torch's SDPA of the first n tokens, called in the way that is the fastest here."""
        q, k, v = (x.transpose(0, 1).contiguous()[None] for x in (self.q, self.k[0], self.v[0]))

        def grouped(n: int) -> Tensor:
            mine, keys, values = (x[:, :, :n] for x in (q, k, v))
            options: dict[str, Any] = {"is_causal": True, "enable_gqa": True}
            return F.scaled_dot_product_attention(mine, keys, values, **options)

        def expanded(n: int) -> Tensor:
            wide = (x[:, :, None, :n].expand(-1, -1, self.shape.group_size, -1, -1) for x in (k, v))
            keys, values = (x.flatten(1, 2) for x in wide)
            return F.scaled_dot_product_attention(q[:, :, :n], keys, values, is_causal=True)

        ways = {"grouped": grouped, "expanded": expanded}
        n = min(self.length, WARM_UP)
        name = fastest({name: functools.partial(way, n) for name, way in ways.items()})
        return ways[name]

    def checks(self) -> list[Check]:
        return [self._check_sparse(), self._check_dense(), self._check_selection()]

    def _check_sparse(self) -> Check:
        """Rows of several query blocks of the very call that is timed."""
        out, blocks = self.hip(), self.layout.query_blocks(self.config.query_block_size)
        picked = torch.linspace(0, len(blocks) - 1, CHECKED_BLOCKS).long().unique().tolist()
        name = f"prefill {self.length}, attention over the chosen keys"
        checks: list[Check] = []
        for i in picked:
            _, row, count, position = blocks[i].tolist()
            rows, last = slice(row, row + count), position + count
            keys = keys_read(self.selection, i, last, self.config)
            positions = torch.arange(position, last)
            kv = (self.k[0], self.v[0])
            attended = (out[rows], self.q[rows], *kv)
            checks.append(check_rows(name, *attended, positions=positions, keys=keys))
        return max(checks, key=lambda check: check.error / check.allowed)

    def _check_dense(self) -> Check:
        count = min(self.length, DENSE_ROWS)
        q, layout = self.q[-count:], whole_sequences(1, count, self.length, self.q.device)
        out, _ = block_sparse_attention(
            q, self.pool, layout, config=self.config, backend=self.backend, check=False
        )
        positions, keys = torch.arange(self.length)[-count:], [torch.arange(self.length)]
        name = f"prefill {self.length}, dense attention"
        return check_rows(name, out, q, self.k[0], self.v[0], positions=positions, keys=keys)

    def _check_selection(self) -> Check:
        """On inputs whose scores are exact, the search equals its definition index for index."""
        count = min(self.length, GRID_BLOCKS * self.config.query_block_size)
        q, k = on_grid(self.q[-count:]), on_grid(self.k)
        index = build_index(k, **self.config.index_form._asdict())
        if index.summaries is not None and index.code_bits == 16:
            index = replace(index, summaries=on_grid(index.summaries))
        layout = whole_sequences(1, count, self.length, q.device)
        found, defined = (
            select_blocks(
                q, index, layout, config=self.config, rule=self.rule, backend=backend, check=False
            )
            for backend in (self.backend, "reference")
        )
        name = f"prefill {self.length}, chosen blocks against the definition"
        return check_equal(name, found.indices, defined.indices)


def check_whole_budget(shape: LayerShape, dtype: torch.dtype, backend: str) -> Check:
    """A budget of everything gives the dense result."""
    length, config = 1024, HiPConfig(budget=1024, dense_below=0)
    case = Prefill(shape, length, dtype, config, backend)
    positions, rows = torch.arange(length - DENSE_ROWS, length), slice(-DENSE_ROWS, None)
    everything = [torch.arange(length)]
    name = "a budget of everything is dense attention"
    kv = (case.k[0], case.v[0])
    attended = (case.hip()[rows], case.q[rows], *kv)
    return check_rows(name, *attended, positions=positions, keys=everything)
