"""`block_sparse_attention`: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from hipserve.config import DEFAULT, HiPConfig
from hipserve.ops import checks
from hipserve.ops.block_sparse_attention import operator
from hipserve.plan import BatchLayout
from hipserve.types import BlockSelection, KeyPool, TileLists


def block_sparse_attention(
    q: Tensor,
    pool: KeyPool,
    layout: BatchLayout,
    selection: BlockSelection | None = None,
    *,
    config: HiPConfig | None = None,
    sliding_window: int = 0,
    sm_scale: float | None = None,
    softcap: float = 0.0,
    rope: Tensor | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    check: bool = True,
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention of every row over SINK + its chosen blocks + WINDOW.

    Args:
        q: `[num_tokens, num_q_heads, head_dim]`, packed over the sequences, float.
        pool: the pages, keys and values of this call already written; or the tiles that `lists`
            names, for this selection (`hipserve.ops.load_tiles`).
        layout: lengths and page ids of the batch.
        selection: from `select_blocks` with the same `config`; None for dense causal attention.
        config: the block sizes and sinks that the selection was made with.
        sliding_window: of a model's own windowed layer: row p reads (p - sliding_window, p]. Only
            without a selection; 0 for none.
        sm_scale: factor of q.k, applied once; `head_dim ** -0.5` if None.
        softcap: c > 0 turns a scaled score s into c * tanh(s / c).
        rope: `[2, head_dim]` int32, how the model turns its keys (`hipserve.ops.rope`): for a
            config that extends it by `stream`. Pruned query blocks that begin at
            `trained_length` or behind see sinks, chosen blocks and window at consecutive positions.
        backend: `auto`, `cpu`, `triton` or `reference`.
        out: like q, contiguous: room that the result may take, instead of memory of its own.
        check: False skips the checks, for callers that have made them.

    Returns:
        out like q, and lse `[num_tokens, num_q_heads]` float32 (float64 for float64), natural
        logarithm. A row without keys gives zeros and -inf.

    Raises:
        ArgumentError: a tensor or number does not fit the others.
        BackendError: the backend asked for cannot run.
    """
    config = config or DEFAULT
    if check:
        _check(q, pool, layout, selection, config)
        _check_scores(sm_scale, softcap)
        _check_window(sliding_window, selection)
        checks.check_rope(q, rope, config)
    block_table, lists = layout.block_table, pool.lists
    scale: float = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    if pool.places is not None:
        block_table = pool.places[block_table]
    return operator.attention(out)(
        q,
        pool.k_cache,
        pool.v_cache,
        block_table,
        layout.query_blocks(config.query_block_size),
        indices=selection.indices.contiguous() if selection else None,
        window_start=selection.window_start.contiguous() if selection else None,
        num_sink_tokens=config.num_sink_tokens,
        key_block_size=config.key_block_size,
        sliding_window=sliding_window,
        sm_scale=scale * pool.k_scale,
        v_scale=pool.v_scale,
        softcap=softcap,
        query_block_size=config.query_block_size,
        lists=lists.slots if lists else None,
        page_size=lists.page_size if lists else pool.page_size,
        rope=rope if config.streams else None,
        trained_length=config.trained_length or 0,
        backend=backend,
    )


def _check(
    q: Tensor,
    pool: KeyPool,
    layout: BatchLayout,
    selection: BlockSelection | None,
    config: HiPConfig,
) -> None:
    checks.check_floats("q", q, "[num_tokens, num_q_heads, head_dim]")
    checks.check_pool(q, pool)
    if pool.lists is not None:
        _check_lists(q, pool.lists, layout, config)
    elif pool.places is None:
        checks.check_layout(q, pool, layout)
    if selection is not None:
        _check_selection(q, pool, layout, selection, config)


def _check_lists(q: Tensor, lists: TileLists, layout: BatchLayout, config: HiPConfig) -> None:
    dims = "[num_query_blocks, heads, max_tiles]"
    checks.check_ints("pool.lists", lists.slots, dims, q.device)
    blocks = layout.query_blocks(config.query_block_size).shape[0]
    found, hint = lists.slots.shape[0], "load the tiles of this selection"
    checks.require(found == blocks, "pool.lists", f"lists of {blocks} query blocks", found, hint)


def _check_scores(sm_scale: float | None, softcap: float) -> None:
    if sm_scale is not None:
        checks.check_scale(sm_scale)
    checks.check_softcap(softcap)


def _check_window(sliding_window: int, selection: BlockSelection | None) -> None:
    checks.require(
        sliding_window >= 0 and (selection is None or sliding_window == 0),
        "sliding_window",
        "0, or a model's window of 1 or more keys without a selection",
        sliding_window,
        "leave it out, or pass selection=None",
    )


def _check_selection(
    q: Tensor, pool: KeyPool, layout: BatchLayout, selection: BlockSelection, config: HiPConfig
) -> None:
    blocks = layout.query_blocks(config.query_block_size).shape[0]
    dims = "[num_query_blocks, heads, max_selected]"
    checks.check_ints("selection.indices", selection.indices, dims, q.device)
    checks.check_ints(
        "selection.window_start", selection.window_start, "[num_query_blocks]", q.device
    )
    for argument, x in (
        ("selection.indices", selection.indices),
        ("selection.window_start", selection.window_start),
    ):
        checks.require(
            x.shape[0] == blocks,
            argument,
            f"{blocks} query blocks, as the layout has",
            x.shape[0],
            "select again for this batch",
        )
    end = layout.query_blocks(config.query_block_size)[:, 2:].sum(1)
    start = selection.window_start
    checks.require(
        bool(((start >= 0) & (start <= end.clamp(min=config.num_sink_tokens))).all()),
        "selection.window_start",
        "positions from 0 to the end of each query block, or the end of the sinks",
        start.tolist()[:8],
        "select again for this batch",
    )
    heads = selection.indices.shape[1]
    checks.require(
        heads in (pool.num_kv_heads, q.shape[1]),
        "selection.indices",
        f"{pool.num_kv_heads} or {q.shape[1]} heads",
        heads,
        "select with the same heads",
    )
    ends = (selection.indices + 1) * config.key_block_size
    checks.require(
        bool(((selection.indices < 0) | (ends <= start[:, None, None])).all()),
        "selection.indices",
        f"blocks of {config.key_block_size} keys before the window of their query block",
        int(selection.indices.max()) if selection.indices.numel() else -1,
        "pass the config that the selection was made with",
    )
