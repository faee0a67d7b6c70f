"""One attention layer, whole: append, select, fetch, attend, account, meter."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hipserve.attention.account import KeyCounter
from hipserve.attention.dense import attend_chosen, dense_head
from hipserve.attention.meter import Attended, Meter
from hipserve.attention.selections import Search, Selections
from hipserve.attention.sinks import absorb_sinks
from hipserve.config import DEFAULT, NO_INDEX, HiPConfig, IndexForm
from hipserve.ops import select_blocks
from hipserve.plan import BatchLayout, PruningRule
from hipserve.types import BlockSelection, KeyIndex, KeyPool


class LayerKeys(Protocol):
    """The keys and values of one layer in one call: where they are and what the call adds."""

    def append(self) -> None:
        """Writes what the call adds, pool and index."""
        ...

    @property
    def layout(self) -> BatchLayout:
        """The batch, once the call has appended; asked for only if pages are read."""
        ...

    @property
    def fresh(self) -> tuple[Tensor, Tensor] | None:
        """What `append` added, k and v `[batch, new, num_kv_heads, head_dim]`, where that is all
        that the layer holds: then torch's dense kernels can read it."""
        ...

    @property
    def index(self) -> KeyIndex:
        """What a search reads; asked for only if something is searched."""
        ...

    def fetch(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,
        config: HiPConfig,
        rule: PruningRule | None,
        /,
    ) -> KeyPool:
        """Pages in which the chosen keys and values are present, and those that are always read.

        `selection` has an entry for every query block of `layout`, and was made with `config` and
        `rule`; None for everything.
        """
        ...


@dataclass(frozen=True, slots=True)
class HeldKeys:
    """Keys that are written already, all of them where attention reads them: `LayerKeys`."""

    pool: KeyPool
    index: KeyIndex
    layout: BatchLayout
    fresh: None = None

    def append(self) -> None:
        """Nothing is left to write."""

    def fetch(self, *_: object) -> KeyPool:
        return self.pool


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """How one layer attends. Every caller goes through it, whatever holds its keys.

    Attributes:
        config: what is pruned and kept.
        rule: which query blocks are pruned; None where none is.
        sliding_window: the model's own window of this layer; 0 for none. Such a layer has no rule.
        sm_scale, softcap, backend: as in `hip_attention`.
        rope: `[2, head_dim]` int32, how the model turns its keys, where `config` streams
            (`hipserve.ops.rope`).
        sink_logits: `[num_q_heads]` that the model has learned, as in `absorb_sinks`, or None.
        selections: selections that later steps use again; None selects in every step.
        account: counts the keys that are read; None counts nothing.
        meter: estimates the attention that is left unread, of pages that hold all keys; None does
            nothing.
    """

    config: HiPConfig = DEFAULT
    rule: PruningRule | None = None
    sliding_window: int = 0
    sm_scale: float | None = None
    softcap: float = 0.0
    rope: Tensor | None = None
    sink_logits: Tensor | None = None
    backend: str = "auto"
    selections: Selections | None = None
    account: KeyCounter | None = None
    meter: Meter | None = None

    @property
    def index_form(self) -> IndexForm:
        """What a search reads of the keys."""
        return NO_INDEX if self.rule is None else self.config.index_form

    def forward(
        self, q: Tensor, keys: LayerKeys, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of packed rows.

        q: `[num_tokens, num_q_heads, head_dim]`, packed over the sequences, float.
        out: like q, as in `block_sparse_attention`.

        Returns:
            out like q, and lse `[num_tokens, num_q_heads]`, as from `block_sparse_attention`.
        """
        keys.append()
        return self._attend(q, keys, keys.layout, out)

    def forward_batch(
        self, q: Tensor, keys: LayerKeys, *, head: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of sequences with equally many rows.

        The first rows of whole sequences read everything: torch's dense kernels compute them.

        Args:
            q: `[batch, query_len, num_q_heads, head_dim]`.
            keys: of these sequences.
            head: False computes all rows by `block_sparse_attention`, which returns their lse.

        Returns:
            out like q, and lse `[batch, query_len, num_q_heads]`; None where torch's dense kernels
            computed some rows.
        """
        batch, query_len = q.shape[:2]
        keys.append()
        first = self._dense_head(q, keys) if head else q[:, :0]
        rows = first.shape[1]
        if rows == query_len:
            self._count_dense(batch, rows)
            return first, None
        layout = keys.layout
        if rows and self.rule is not None:
            if layout.may_prune(self.rule):  # else all rows are counted together
                self._count_dense(batch, rows)
            layout = layout.behind(rows, self.rule.query_block_size)
        out, lse = self._attend(q.flatten(0, 1), keys, layout)
        out = out.view(batch, query_len, *out.shape[1:])
        if not rows:
            return out, lse.view(batch, query_len, -1)
        out[:, :rows] = first
        return out, None

    def _dense_head(self, q: Tensor, keys: LayerKeys) -> Tensor:
        """`[batch, rows, num_q_heads, head_dim]`: the first rows, which read everything."""
        fresh = keys.fresh
        if fresh is None or self.sliding_window:
            return q[:, :0]
        return dense_head(
            q,
            *fresh,
            rule=self.rule,
            sm_scale=self.sm_scale,
            softcap=self.softcap,
            sink_logits=self.sink_logits,
            backend=self.backend,
        )

    def _attend(
        self, q: Tensor, keys: LayerKeys, layout: BatchLayout, room: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # Steps that stay within the trained length are those of a model that does not stream.
        rope = self.rope if layout.reaches(self.config.trained_length or 0) else None
        account = self.account
        began = time.perf_counter() if account else 0.0
        selection = self._select(q, keys, layout, rope)
        selected = time.perf_counter() if account else 0.0
        pool = keys.fetch(selection, layout, self.config, self.rule)
        out, lse = attend_chosen(
            q,
            pool,
            layout,
            selection,
            config=self.config,
            sliding_window=self.sliding_window,
            sm_scale=self.sm_scale,
            softcap=self.softcap,
            rope=rope,
            backend=self.backend,
            out=room,
        )
        if self.sink_logits is not None:
            out, lse = absorb_sinks(out, lse, self.sink_logits, check=False)
        if account:
            account.add_seconds(selected - began, time.perf_counter() - selected)
            if self.rule is not None:
                account.add(selection, layout, self.config)
        if self.meter is not None and selection is not None and self.rule is not None:
            self.meter.measure(
                Attended(
                    q=q,
                    lse=lse,
                    pool=pool,
                    layout=layout,
                    selection=selection,
                    config=self.config,
                    rule=self.rule,
                    sm_scale=self.sm_scale,
                    softcap=self.softcap,
                )
            )
        return out, lse

    def _select(
        self, q: Tensor, keys: LayerKeys, layout: BatchLayout, rope: Tensor | None
    ) -> BlockSelection | None:
        """The selection of every query block; None where all of them read everything."""
        rule, selections = self.rule, self.selections
        if rule is None or not layout.may_prune(rule):
            if selections is not None:
                selections.clear()
            return None
        if selections is not None:
            search = Search(self.config, self.backend, rope)
            return selections.select(q, keys.index, layout, rule, search)
        return select_blocks(
            q,
            keys.index,
            layout,
            config=self.config,
            rule=rule,
            rope=rope,
            backend=self.backend,
            check=False,
        )

    def _count_dense(self, batch: int, rows: int) -> None:
        if self.account is not None and self.rule is not None:
            self.account.add_dense(batch, rows)
