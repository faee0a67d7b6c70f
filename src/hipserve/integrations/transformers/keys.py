"""The keys of one `HiPCache` layer in one call of the attention function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hipserve.attention import KeyCounter, RequestSelections
from hipserve.cache.tiles import TiledPages
from hipserve.config import HiPConfig
from hipserve.ops import write_kv
from hipserve.plan import BatchLayout, CapturedPlan, PruningRule
from hipserve.types import BlockSelection, KeyIndex, KeyPool

if TYPE_CHECKING:
    from hipserve.integrations.transformers.cache import HiPCacheLayer


@dataclass(slots=True)
class PageKeys:
    """The pages of a `HiPCache` layer in one call: `LayerKeys`.

    Attributes:
        layer: holds them.
        query_len: rows of each sequence.
        valid: `[batch, query_len]` bool, False for padding; None where all rows count.
        fresh: what was appended, if the layer holds nothing else.
    """

    layer: HiPCacheLayer
    query_len: int
    valid: Tensor | None
    fresh: tuple[Tensor, Tensor] | None = None

    def append(self) -> None:
        written = self.layer.write(self.valid)
        first = self.query_len == self.layer.seen and self.valid is None
        self.fresh = written if first else None

    @property
    def layout(self) -> BatchLayout:
        pages = self.layer.pages
        if self.valid is None:
            return pages.layout([self.query_len] * len(pages.lengths))
        return pages.layout(self.valid.sum(1).tolist())

    @property
    def index(self) -> KeyIndex:
        return self.layer.pages.index

    def fetch(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,
        config: HiPConfig,
        rule: PruningRule | None,
    ) -> KeyPool:
        return self.layer.pages.fetch(selection, layout, config, rule)


@dataclass(frozen=True, slots=True)
class CapturedKeys:
    """The pages of a `HiPCache` layer in a step that a graph repeats: `LayerKeys`.

    Attributes:
        layer: holds them.
        slots: `[batch]` int64, where the new keys go.
        plan: the batch, at addresses that stay from step to step.
        prunes: some row may be pruned before the graph is recorded again.
        row_tiles: maximum tiles of a list of a row, of keys and values in host memory.
        requests: selections that later steps use again.
        counter: counts the keys that are read.
    """

    layer: HiPCacheLayer
    slots: Tensor
    plan: CapturedPlan
    prunes: bool
    row_tiles: int
    requests: RequestSelections
    counter: KeyCounter
    fresh: None = None

    @property
    def _tiled(self) -> TiledPages | None:
        """The pages, if they are in host memory."""
        store = self.layer.pages.store
        return store if isinstance(store, TiledPages) else None

    def write(self, k: Tensor, v: Tensor) -> None:
        """Writes k and v `[batch, 1, num_kv_heads, head_dim]` and their index."""
        pages = self.layer.pages
        if (tiled := self._tiled) is not None:
            tiled.write_few(k[:, 0], v[:, 0], self.slots)
        else:
            write_kv(k[:, 0], v[:, 0], pages.pool, pages.index, self.slots, check=False)

    def append(self) -> None:
        self.layer.write(None)

    @property
    def layout(self) -> BatchLayout:
        return self.plan.layout

    @property
    def index(self) -> KeyIndex:
        return self.layer.pages.index

    def fetch(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,
        config: HiPConfig,
        *_: object,
    ) -> KeyPool:
        if (tiled := self._tiled) is not None:
            return tiled.load(selection, layout, config, self.row_tiles)
        return self.layer.pages.pool
