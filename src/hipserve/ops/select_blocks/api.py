"""`select_blocks` and `refresh_blocks`: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from hipserve.config import DEFAULT, HiPConfig
from hipserve.ops import checks
from hipserve.ops.select_blocks import operator
from hipserve.plan import BatchLayout, PruningRule, pruning_rule
from hipserve.types import BlockSelection, KeyIndex


def select_blocks(
    q: Tensor,
    index: KeyIndex,
    layout: BatchLayout,
    *,
    config: HiPConfig | None = None,
    rule: PruningRule | None = None,
    rope: Tensor | None = None,
    backend: str = "auto",
    check: bool = True,
) -> BlockSelection:
    """Chooses, for every query block and head, the key blocks that attention will read.

    `config.selector` says how; `hipserve.selectors` has the choice. Selections
    lie inside [num_sink_tokens, window_start), ascend and hold no duplicate.

    Args:
        q: `[num_tokens, num_q_heads, head_dim]`, packed over the sequences, float.
        index: of the pages, keys of this call already written; with summaries where the selector
            reads them.
        layout: lengths and page ids of the batch.
        config: what to keep; the defaults if None.
        rule: which query blocks are pruned; what `config` says for q's device if None.
        rope: `[2, head_dim]` int32, how the model turns its keys (`hipserve.ops.rope`): for a
            config that extends it by `stream`, whose blocks beyond the trained length see far keys
            nearer.
        backend: `auto`, `cpu`, `triton` or `reference`.
        check: False skips the checks, for callers that have made them.

    Returns:
        indices `[num_query_blocks, heads, max_selected]` (`heads` as in `BlockSelection`) and
        window_start `[num_query_blocks]`, both int32.

    Raises:
        ArgumentError: a tensor does not fit the others.
        BackendError: the backend asked for cannot run.
    """
    config = config or DEFAULT
    if check:
        checks.check_floats("q", q, "[num_tokens, num_q_heads, head_dim]")
        checks.check_index(q, index, config.run_size, config.code_bits)
        checks.check_layout(q, index, layout)
        checks.check_rope(q, rope, config)
        if config.run_size is not None and layout.block_table.shape[1] > 1:
            assert index.summaries is not None
            checks.check_page_size(index.page_size, config.run_size, index.summaries.shape[1])
    rule = rule or pruning_rule(config, q.device.type)
    starts = layout.window_starts(rule)
    blocks = (layout.block_table, layout.query_blocks(rule.query_block_size), starts)
    inputs = operator.search_inputs(q, index, *blocks, config=config, rope=rope)
    return BlockSelection(operator.run(inputs, config, backend), starts)


def refresh_blocks(
    q: Tensor,
    index: KeyIndex,
    layout: BatchLayout,
    selection: BlockSelection,
    refresh: Tensor,
    *,
    config: HiPConfig | None = None,
    rule: PruningRule | None = None,
    rope: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """`select_blocks` into an earlier selection, where a flag on the device asks for it.

    What runs depends on shapes only and nothing is read back: a CUDA graph may hold it.

    Args:
        q: `[num_tokens, num_q_heads, head_dim]`, packed over the sequences, float.
        rope: `[2, head_dim]` int32, or None.
        index, layout, config, rule, backend: as in `select_blocks`, but unchecked.
        selection: one entry a query block; overwritten where `refresh` is not 0.
        refresh: `[num_query_blocks]` int32.
    """
    config = config or DEFAULT
    rule = rule or pruning_rule(config, q.device.type)
    starts = layout.window_starts(rule)
    blocks = (layout.block_table, layout.query_blocks(rule.query_block_size), starts)
    inputs = operator.search_inputs(q, index, *blocks, config=config, rope=rope)
    operator.refresh(inputs, config, refresh, selection, backend)
