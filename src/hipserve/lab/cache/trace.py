"""Which blocks real decode steps choose, and how much of their attention goes to each."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.errors import FitError
from hipserve.integrations.transformers import HiPCacheLayer, PagedHandle
from hipserve.lab.recorder import Call, watched
from hipserve.models import LoadedModel
from hipserve.models.passes import make_cache, read
from hipserve.types import BlockSelection


class LayerTrace(NamedTuple):
    """The blocks that one layer chose, step by step.

    Attributes:
        layer: its number.
        blocks: `[steps, heads, max_selected]` int32, ascending, then -1; `heads` as in
            `BlockSelection`.
        mass: `[steps, heads, max_selected]` float32: share of what the row reads that goes to each
            block, mean over the query heads that share the choice.
        keys: keys of the sequence in the last step.
    """

    layer: int
    blocks: Tensor
    mass: Tensor
    keys: int


class _Choice(NamedTuple):
    blocks: Tensor
    mass: Tensor


@torch.no_grad()
def record_trace(
    loaded: LoadedModel, ids: Tensor, steps: int, config: HiPConfig
) -> list[LayerTrace]:
    """Reads `ids` `[1, tokens]` with pruned attention, the last `steps` tokens one by one.

    Every step is a decode step that selects again, after the tokens of the text (teacher-forced).
    Unless the configuration says otherwise, decode steps are pruned at any length.

    Raises:
        FitError: no layer prunes anything at this length.
    """
    below = config.decode_dense_below or 0
    config = config.replace(refresh_interval=1, decode_dense_below=below)
    found: dict[int, list[_Choice]] = {}
    length = 0

    def note(call: Call, out: Tensor) -> Tensor:
        nonlocal length
        if isinstance(call.key, PagedHandle):
            layer, length = call.key.layer, call.key.shape[2]
            if layer.reuse.selection is not None:
                selection = layer.reuse.selection
                mass = block_mass(call, layer, selection, config)
                found.setdefault(call.layer, []).append(_Choice(selection.indices[0].cpu(), mass))
        return out

    loaded.use(config)
    cache = make_cache(loaded)
    for _ in read(loaded, ids[:, :-steps], cache):
        pass
    with watched(loaded, note):
        for token in ids[0, -steps:]:
            for _ in read(loaded, token.view(1, 1), cache):
                pass
    traces = [_trace(layer, found[layer], length) for layer in sorted(found)]
    if not traces:
        raise FitError(
            f"decode steps at {ids.shape[1]:,} tokens are not pruned",
            "give a longer --length, or a lower decode_dense_below in --config",
        )
    return traces


def _trace(layer: int, steps: list[_Choice], keys: int) -> LayerTrace:
    blocks, mass = (torch.stack([step[i] for step in steps]) for i in (0, 1))
    return LayerTrace(layer, blocks, mass, keys)


def block_mass(
    call: Call, layer: HiPCacheLayer, selection: BlockSelection, config: HiPConfig
) -> Tensor:
    """`[heads, max_selected]` float32: the share of attention that each chosen block gets.

    Of `selection` `[1, heads, max_selected]`, for the one row of the call; the shares of sinks,
    window and chosen blocks add up to 1.
    """
    blocks = selection.indices[0].long()
    heads, size = blocks.shape[0], config.key_block_size
    inside = torch.arange(size, device=blocks.device)
    chosen = (blocks[..., None] * size + inside).flatten(1)
    window = torch.arange(int(selection.window_start[0]), call.key.shape[2], device=blocks.device)
    sinks = torch.arange(config.num_sink_tokens, device=blocks.device)
    always = torch.cat([sinks, window]).expand(heads, -1)
    positions = torch.cat([chosen, always], dim=1)
    scores = _scores(call, layer, positions)
    scores[:, :, : chosen.shape[1]].masked_fill_((chosen < 0)[:, None], -torch.inf)
    shares = scores.softmax(-1)[:, :, : chosen.shape[1]].unflatten(2, (-1, size))
    return shares.sum(-1).mean(1).cpu()


def _scores(call: Call, layer: HiPCacheLayer, positions: Tensor) -> Tensor:
    """`[heads, group, count]` float32 of keys `[heads, count]`; unused positions are negative."""
    heads = positions.shape[0]
    pool = cast("Any", layer.pages.pool)
    table = layer.pages.layout([1]).block_table[0].long()
    per_kv_head = heads // pool.num_kv_heads
    kv_heads = torch.arange(heads, device=positions.device)[:, None] // per_kv_head
    at = positions.clamp(min=0)
    keys = pool.k_cache[table[at // pool.page_size], at % pool.page_size, kv_heads].float()
    rows = call.query[0, :, 0].float().unflatten(0, (heads, -1))
    scores = rows @ keys.mT * call.scale
    return call.softcap * torch.tanh(scores / call.softcap) if call.softcap else scores
