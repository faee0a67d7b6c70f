"""The definition of block-sparse attention: eager torch, one query block at a time, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.offload import TILE_SIZE
from hipserve.ops.rope import turn
from hipserve.types import KeyPool


def block_sparse_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_blocks: Tensor,
    indices: Tensor | None,
    window_start: Tensor | None,
    *,
    num_sink_tokens: int,
    key_block_size: int,
    sliding_window: int,
    sm_scale: float,
    v_scale: float,
    softcap: float,
    query_block_size: int,  # noqa: ARG001 - sizes tiles on a GPU
    lists: Tensor | None = None,
    page_size: int = 0,  # noqa: ARG001 - likewise
    rope: Tensor | None = None,
    trained_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `hipserve.ops.block_sparse_attention`.

    Returns:
        out: `[num_tokens, num_q_heads, head_dim]`, as `q`.
        lse: `[num_tokens, num_q_heads]` float32, or float64 for float64.
    """
    kv = KeyPool(k_cache, v_cache, v_scale=v_scale)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=accumulator(q.dtype), device=q.device)
    for i, (seq, row, num_rows, position) in enumerate(query_blocks.tolist()):
        last = position + num_rows
        shifts = None
        if indices is None or window_start is None:
            keys = torch.arange(last, device=q.device)[None]
        else:
            window = int(window_start[i])
            keys = read_keys(indices[i], key_block_size, num_sink_tokens, window, last)
            if rope is not None and position >= trained_length:
                shifts = consecutive(keys, window)
        if lists is None:
            in_pages = places(keys, block_table[seq].long(), kv.page_size)
        else:
            in_pages = places_in_tiles(keys, lists[i])
        rows = q[row : row + num_rows]
        positions = torch.arange(position, last, device=q.device)
        part = attend(
            rows,
            positions,
            keys,
            kv,
            in_pages,
            shifts=shifts,
            rope=rope,
            sliding_window=sliding_window,
            sm_scale=sm_scale,
            softcap=softcap,
        )
        out[row : row + num_rows], lse[row : row + num_rows] = part
    return out, lse


def read_keys(indices: Tensor, size: int, num_sink_tokens: int, window: int, last: int) -> Tensor:
    """`[heads, keys]`: positions of SINK, chosen blocks and WINDOW; -1 where a head has fewer."""
    device = indices.device
    sink = torch.arange(min(num_sink_tokens, last), device=device)
    recent = torch.arange(min(window, last), last, device=device)
    chosen = indices.long()[..., None] * size + torch.arange(size, device=device)
    chosen = chosen.masked_fill(indices[..., None] < 0, -1).flatten(1)
    heads = indices.shape[0]
    return torch.cat([sink.expand(heads, -1), chosen, recent.expand(heads, -1)], dim=1)


def consecutive(keys: Tensor, window: int) -> Tensor:
    """`[heads, keys]`: how much later each of `keys` `[heads, keys]` is seen, so that those before
    the window lie one behind the other and end where it starts."""
    there = keys >= 0
    before = (there & (keys < window)).sum(1, keepdim=True)
    return window - before + there.cumsum(1) - 1 - keys


def places(keys: Tensor, pages: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Page and slot of `keys` `[heads or 1, keys]` in a sequence with these `pages` `[n]`."""
    at = keys.clamp(min=0)
    return pages[at // page_size], at % page_size


def places_in_tiles(keys: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Tile and slot of `keys` `[heads or 1, keys]`; `tiles` `[heads, max_tiles]` lists their tiles
    in the order of the keys that there are."""
    n = ((keys >= 0).cumsum(1) - 1).clamp(min=0).expand(len(tiles), -1)
    return tiles.long().gather(1, n // TILE_SIZE), n % TILE_SIZE


def attend(
    rows: Tensor,
    positions: Tensor,
    keys: Tensor,
    kv: KeyPool,
    in_pages: tuple[Tensor, Tensor],
    *,
    shifts: Tensor | None,
    rope: Tensor | None,
    sliding_window: int,
    sm_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attention of `rows` `[rows, num_q_heads, head_dim]` at `positions` `[rows]` over `keys`
    `[heads or 1, keys]`, whose page and slot are `in_pages`, likewise; seen later by `shifts`."""
    dtype = accumulator(rows.dtype)
    num_q_heads = rows.shape[1]
    q_heads = torch.arange(num_q_heads, device=rows.device)
    keys, page, slot = (x[q_heads * len(x) // num_q_heads] for x in (keys, *in_pages))
    kv_heads = (q_heads * kv.num_kv_heads // num_q_heads)[:, None]
    k = kv.k_cache[page, slot, kv_heads].to(rows.dtype)
    v = kv.v_cache[page, slot, kv_heads].to(dtype) * kv.v_scale
    if shifts is not None and rope is not None:
        k = turn(k, shifts[q_heads * len(shifts) // num_q_heads], rope)

    scores = rows.transpose(0, 1).to(dtype) @ k.to(dtype).mT * sm_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    keys = keys[:, None]
    hidden = (keys < 0) | (keys > positions[:, None])
    if sliding_window:
        hidden = hidden | (keys <= positions[:, None] - sliding_window)
    scores = scores.masked_fill(hidden, -torch.inf)

    lse = torch.logsumexp(scores, dim=-1)
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(scores - shift[..., None])
    return (weights @ v).transpose(0, 1).to(rows.dtype), lse.T


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Scores and sums are kept in float32, or in float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
