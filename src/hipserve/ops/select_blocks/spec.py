"""What a search reads of a configuration: nothing else reaches a kernel, or compiles it again."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.ops._triton.constants import HashedOnce
from hipserve.selectors import SELECTORS, Selector


class SearchInputs(NamedTuple):
    """The tensors that a search reads.

    Attributes:
        q: `[num_tokens, num_q_heads, head_dim]`.
        codes, code_scales, summaries, summary_scales: as in `KeyIndex`: codes `[num_pages,
            page_size, num_kv_heads, ...]`; no summaries where the selector reads none.
        block_table: `[num_seqs, max_pages]` int32.
        query_blocks: `[num_query_blocks, 4]` int32: sequence, first row, rows, first position.
        window_starts: `[num_query_blocks]` int32: where what is searched ends.
        rope: `[2, head_dim]` int32, as in `hipserve.ops.rope`; None where no block lies beyond the
            trained length.
        head_blocks: `[heads]` int32, key blocks that each head of a selection may choose; None for
            `max_selected` each.
    """

    q: Tensor
    codes: Tensor
    code_scales: Tensor | None
    summaries: Tensor | None
    summary_scales: Tensor | None
    block_table: Tensor
    query_blocks: Tensor
    window_starts: Tensor
    rope: Tensor | None
    head_blocks: Tensor | None = None


@dataclass(frozen=True)
class SearchSpec(HashedOnce):
    """The fields of `HiPConfig` that decide what a query block chooses, by the same names.

    Window starts are not among them: `hipserve.plan` computes those, once a step for all layers.

    Attributes:
        selector: how blocks are found, with options of its own; the other fields are for all.
        max_selected: key blocks that one query block may choose.
        trained_length: from where on query blocks see far keys nearer; None where none does.
    """

    __hash__ = HashedOnce.__hash__
    selector: Selector
    budget: int
    max_selected: int
    key_block_size: int
    query_block_size: int
    query_stride: int
    run_size: int | None
    code_bits: int
    relative_scores: bool
    share_group: bool
    num_sink_tokens: int
    trained_length: int | None

    def selection_shape(self, inputs: SearchInputs) -> tuple[int, int, int]:
        """The shape of `indices`: `[num_query_blocks, heads, max_selected]`."""
        heads = inputs.codes.shape[2] if self.share_group else inputs.q.shape[1]
        return inputs.query_blocks.shape[0], heads, self.max_selected

    def dumps(self) -> str:
        """The JSON text that `loads` reads back: custom operators take text."""
        return json.dumps({"name": self.selector.name, **asdict(self)})

    @classmethod
    def loads(cls, text: str) -> SearchSpec:
        values = json.loads(text)
        options = values.pop("selector")
        return cls(selector=SELECTORS[values.pop("name")](**options), **values)


@functools.lru_cache(256)
def search_spec(config: HiPConfig, moved: bool = False) -> SearchSpec:
    """What a search reads of `config`; moved: some keys are seen nearer than they are."""
    own = ("selector", "trained_length")
    shared = [field.name for field in fields(SearchSpec) if field.name not in own]
    return SearchSpec(
        selector=SELECTORS[config.selector].of(config),
        trained_length=config.trained_length if moved else None,
        **{name: getattr(config, name) for name in shared},
    )
