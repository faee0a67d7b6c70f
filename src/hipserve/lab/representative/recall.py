"""How many of the best blocks a search finds, head by head."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.lab.recorder import LayerRecord
from hipserve.ops import build_index, select_blocks
from hipserve.plan import BatchLayout
from hipserve.selectors.tree import Representative

PAGE_SIZE = 256
TREES: tuple[Representative, ...] = get_args(Representative)
SEARCHES = (*TREES, "bound")
"""The paper's tree by its representatives, and the descent through summaries."""


def search_recall(record: LayerRecord, positions: Tensor, config: HiPConfig) -> dict[str, Tensor]:
    """`[heads]` float64 of each search: the share of the best blocks that it chooses.

    The best are those with the highest scores of any key, which a search through all keys finds;
    every row is a decode step that selects for itself. `heads` as in `BlockSelection`.

    positions: `[rows]` int64, of the record's queries.
    """
    pages = record.keys.shape[0] // PAGE_SIZE
    keys = record.keys[: pages * PAGE_SIZE].contiguous().unflatten(0, (pages, PAGE_SIZE))
    rows = positions < pages * PAGE_SIZE
    chosen = positions[rows].tolist()
    table = torch.arange(pages, dtype=torch.int32, device=keys.device).expand(len(chosen), -1)
    layout = BatchLayout.of(table.contiguous(), [p + 1 for p in chosen], [1] * len(chosen))
    plain = {"dense_below": 0, "decode_dense_below": 0, "budget_factors": ()}
    base = config.replace(**plain)  # searches are compared with one budget for all heads

    def select(**fields: object) -> Tensor:
        form = base.replace(**fields)
        index = build_index(keys, **form.index_form._asdict())
        blocks = select_blocks(record.queries[rows].contiguous(), index, layout, config=form)
        return _members(blocks.indices, pages * PAGE_SIZE // base.key_block_size)

    everything = math.ceil(record.keys.shape[0] / base.budget)
    best = select(selector="bound", rerank=max(everything, base.rerank), code_bits=16)
    found = {name: select(selector="tree", representative=name) for name in TREES}
    found["bound"] = select(selector="bound")
    counts = best.sum(-1).double()
    return {name: ((best & own).sum(-1) / counts).mean(0).cpu() for name, own in found.items()}


def _members(indices: Tensor, count: int) -> Tensor:
    """`[rows, heads, count]` bool: is it one of the blocks `[rows, heads, max_selected]`?"""
    members = torch.zeros(*indices.shape[:2], count + 1, dtype=torch.bool, device=indices.device)
    return members.scatter(2, indices.long().where(indices >= 0, count), True)[..., :count]
