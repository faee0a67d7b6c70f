"""What every KV head of a model loses with budgets of several sizes, in one pass over a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hipserve.attention.hip import WholeKeys
from hipserve.config import HiPConfig
from hipserve.errors import FitError
from hipserve.lab.quality.passes import numbers_to_try
from hipserve.lab.recorder import Call, nothing_to_prune, read_watched
from hipserve.models import LoadedModel
from hipserve.ops import block_sparse_attention, select_blocks
from hipserve.plan import pruning_rule
from hipserve.types import KeyPool

BLOCKS = 64
"""Query blocks of a text that are measured unless told otherwise."""


class _Sums:
    """Squares of one layer, over the rows so far.

    Attributes:
        lost: `[heads, factors]` float64, of what the output of each KV head's query heads changes.
        whole: of the dense output of all heads.
    """

    def __init__(self) -> None:
        self.lost: Tensor | float = 0.0
        self.whole = 0.0


def sampled_blocks(config: HiPConfig, length: int, device: str, count: int = BLOCKS) -> list[int]:
    """First positions of up to `count` query blocks, spread over those that are pruned.

    Raises:
        FitError: none of `length` tokens is.
    """
    size = config.query_block_size

    def blocks(config: HiPConfig, length: int) -> list[int]:
        rule = pruning_rule(config, device)
        return [p for p in range(0, length - size + 1, size) if rule.prunes(p, size)]

    pruned = blocks(config, length)
    if not pruned:
        hint = numbers_to_try(config, length, lambda config, length: bool(blocks(config, length)))
        raise FitError(f"nothing to prune in {length:,} tokens", hint)
    count = min(count, len(pruned))
    return [pruned[i * (len(pruned) - 1) // max(count - 1, 1)] for i in range(count)]


@torch.no_grad()
def layer_errors(
    loaded: LoadedModel,
    ids: Tensor,
    config: HiPConfig,
    factors: Sequence[float],
    *,
    blocks: int = BLOCKS,
) -> dict[int, Tensor]:
    """Error of every KV head with each factor of the budget, by layer: `[heads, factors]` float64.

    The model reads `ids` `[1, tokens]` with dense attention. In `blocks` query blocks, spread over
    those that `config` prunes, what its search chooses is attended to as well. The error of a head
    is the square of what that changes in the output of its query heads, as a share of the square of
    the output of all heads of the layer. The errors of the heads of a layer add up to its own.

    Layers with a window of their own and `dense_layers` are left out: nothing prunes them.

    Raises:
        FitError: nothing is pruned at this length, or in any layer; or the model has dense
            attention of its own, which nobody can watch (`lab.recorder.watched`).
    """
    positions = torch.tensor(sampled_blocks(config, ids.shape[1], ids.device.type, blocks))
    positions = positions.to(ids.device)
    sums: dict[int, _Sums] = {}

    def add(call: Call, out: Tensor) -> Tensor:
        if not call.window and call.layer not in config.dense_layers:
            _add(sums.setdefault(call.layer, _Sums()), call, out[0], positions, config, factors)
        return out

    read_watched(loaded, ids, add)
    if not sums:
        raise nothing_to_prune(loaded)
    return {layer: torch.as_tensor(own.lost) / own.whole for layer, own in sorted(sums.items())}


def _add(
    sums: _Sums,
    call: Call,
    out: Tensor,
    positions: Tensor,
    config: HiPConfig,
    factors: Sequence[float],
) -> None:
    """Adds the query blocks of one call, `out` `[query_len, num_q_heads, head_dim]`, that begin at
    `positions`."""
    size, heads = config.query_block_size, call.key.shape[1]
    k, v = call.key.transpose(1, 2), call.value.transpose(1, 2)
    keys = WholeKeys(k, v, out.shape[0], config.index_form)
    blocks = keys.layout.query_blocks(size)
    chosen = (torch.isin(blocks[:, 3], positions) & (blocks[:, 2] == size)).nonzero()[:, 0]
    if not len(chosen):
        return
    layout, index = keys.layout.only(size, chosen), keys.index
    rows = (blocks[chosen, 1, None] + torch.arange(size, device=out.device)).flatten()
    dense = out[rows].float()
    q, pool = call.query[0].transpose(0, 1).contiguous(), KeyPool(k, v)
    lost: list[Tensor] = []
    for factor in factors:
        own = config.replace(budget_factors=[[factor]])
        selection = select_blocks(q, index, layout, config=own)
        pruned, _ = block_sparse_attention(
            q, pool, layout, selection, config=own, sm_scale=call.scale
        )
        squares = (pruned[rows].float() - dense).square().sum((0, 2), dtype=torch.float64)
        lost.append(squares.unflatten(0, (heads, -1)).sum(1))
    sums.lost = sums.lost + torch.stack(lost, dim=1).cpu()
    sums.whole += float(dense.square().sum(dtype=torch.float64))
