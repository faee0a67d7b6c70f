"""What a search reads of a configuration: nothing else reaches a kernel, or compiles it again."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

from torch import Tensor

from hipserve.config import HiPConfig, Representative, Selector


@dataclass(frozen=True, slots=True)
class SearchSpec:
    """The fields of `HiPConfig` that decide what a query block chooses, by the same names.

    Window starts are not among them: `hipserve.plan` computes those, once a step for all layers.
    """

    selector: Selector
    budget: int
    representative: Representative
    seed: int
    key_block_size: int
    query_block_size: int
    query_stride: int
    bound_block_size: int
    bound_reach: float
    rerank: int
    relative_scores: bool
    share_group: bool
    num_sink_tokens: int

    @property
    def max_selected(self) -> int:
        """Key blocks that one query block may choose."""
        return self.budget // self.key_block_size

    def selection_shape(
        self, q: Tensor, codes: Tensor, query_blocks: Tensor
    ) -> tuple[int, int, int]:
        """Of `indices`: `[num_query_blocks, heads, max_selected]`.

        Args:
            q: `[num_tokens, num_q_heads, head_dim]`.
            codes: `[num_pages, page_size, num_kv_heads, head_dim]`.
            query_blocks: `[num_query_blocks, 4]`.
        """
        heads = codes.shape[2] if self.share_group else q.shape[1]
        return query_blocks.shape[0], heads, self.max_selected

    @property
    def uses_tree(self) -> bool:
        return self.selector == "tree"

    @property
    def uses_bounds(self) -> bool:
        return self.selector == "bound"

    def dumps(self) -> str:
        """The JSON text that `loads` reads back: custom operators take text."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> SearchSpec:
        return cls(**json.loads(text))


@functools.lru_cache(256)
def search_spec(config: HiPConfig) -> SearchSpec:
    """What a search reads of `config`."""
    return SearchSpec(
        selector=config.selector,
        budget=config.budget,
        representative=config.representative,
        seed=config.seed,
        key_block_size=config.key_block_size,
        query_block_size=config.query_block_size,
        query_stride=config.query_stride,
        bound_block_size=config.bound_block_size,
        bound_reach=config.bound_reach,
        rerank=config.rerank,
        relative_scores=config.relative_scores,
        share_group=config.share_group,
        num_sink_tokens=config.num_sink_tokens,
    )
