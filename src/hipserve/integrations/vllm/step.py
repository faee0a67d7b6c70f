"""One step of vLLM in hipserve's words: what all layers of a KV cache group share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata

from hipserve.cache import Write
from hipserve.integrations.vllm.kv_block import DueRuns
from hipserve.plan import CapturedPlan, SequenceStep, StepPlan

if TYPE_CHECKING:
    from hipserve.integrations.vllm.runners import StepRequests
    from hipserve.plan import PruningRule


@dataclass
class HiPStep(AttentionMetadata):
    """What the layers of one step need, built once for all of them.

    vLLM copies its fields into its own classes and adds attributes, hence no slots.

    Attributes:
        num_tokens: rows of q that count; the rest is padding.
        slot_mapping: `[num_tokens]` int64, where their keys and values go.
        plan: the batch, and which query blocks select again.
        selects: some query block is pruned, or its selection kept; else every layer is dense.
        counted_layer: the layer whose reads are counted for all pruned ones.
        single_rows: every request has one row.
        found_pages: `[n]` int64, pages of keys that a request of this step found computed when it
            started, or None: their index is built before anybody reads it.
        due_runs: runs that are joined once the keys of the step are written; None for none.
        writes: what every sequence appends, where keys and values are not in KV blocks.
        row_tiles: maximum tiles of a list of a row, where keys and values are in host memory and
            layers only launch, since vLLM may replay the step; 0 in other steps.
        first_row: of q.
        parts: steps that are computed one after the other in place of this one, whose keys are
            written first, those of all parts; none for all at once.
    """

    num_tokens: int
    slot_mapping: Tensor
    plan: StepPlan | CapturedPlan
    selects: bool
    counted_layer: str
    single_rows: bool = False
    found_pages: Tensor | None = None
    due_runs: DueRuns | None = None
    writes: Sequence[Write] = ()
    row_tiles: int = 0
    first_row: int = 0
    parts: list[HiPStep] = field(default_factory=list["HiPStep"])

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows of `x` `[num_tokens, ...]` that are of this step, and no padding.

        Most steps have all, and a slice costs more than asking.
        """
        whole = x.shape[0] == self.num_tokens
        return x if whole else x[self.first_row : self.first_row + self.num_tokens]


def host_seq_lens(common: CommonAttentionMetadata) -> Tensor:
    """`[num_reqs]` int32 on the host, without waiting for a device.

    With speculative decoding a device's lengths may be shorter than these, by the drafts that were
    rejected; a prompt's are the same.
    """
    bound = common.seq_lens_cpu_upper_bound
    if bound is None or common.seq_lens.device.type == "cpu":
        return common.seq_lens.cpu()
    return bound[: common.num_reqs]


def sequences(
    common: CommonAttentionMetadata, requests: StepRequests, rule: PruningRule
) -> list[SequenceStep]:
    """What every row does; one that reads every key keeps nothing and counts as no decode row.

    Where requests are known, rows beyond them pad a graph's batch and are left out.
    """
    lens = common.query_start_loc_cpu.diff().tolist()
    prefilling = common.is_prefilling.tolist() if common.is_prefilling is not None else []
    seq_lens = host_seq_lens(common).tolist()
    pruned = [rule.prunes(n - 1, 1) for n in seq_lens]
    steps: list[SequenceStep] = []
    for i, request in enumerate(requests.rows or (None,) * common.num_reqs):
        reads_prompt = i < len(prefilling) and prefilling[i]
        decoding = lens[i] == 1 and pruned[i] and not reads_prompt
        steps.append(SequenceStep(request, seq_lens[i], decoding, reads_prompt))
    return steps


def found_keys(common: CommonAttentionMetadata, requests: StepRequests) -> list[tuple[int, int]]:
    """Row and number of keys of every request that starts in this step behind computed keys.

    Where it is unknown which requests start, all count whose prompt is being read.
    """
    if requests.rows is not None and not requests.started:
        return []
    prefilling = common.is_prefilling
    if requests.rows is None and (prefilling is None or not bool(prefilling.any())):
        return []
    starts = (host_seq_lens(common) - common.query_start_loc_cpu.diff()).tolist()
    if requests.rows is None:
        assert prefilling is not None
        rows = [i for i, reading in enumerate(prefilling.tolist()) if reading]
    else:
        rows = [i for i, request in enumerate(requests.rows) if request in requests.started]
    return [(row, starts[row]) for row in rows if starts[row] > 0]


def found_pages(block_table: Tensor, page_size: int, found: list[tuple[int, int]]) -> Tensor | None:
    """`[n]` int64, the pages of found keys, each once; None where there are none.

    Args:
        block_table: `[num_reqs, max_pages]` int32.
        found: row and number of keys, as `found_keys` gives them.
    """
    if not found:
        return None
    pages = [block_table[row, : -(-keys // page_size)] for row, keys in found]
    return torch.cat(pages).long().unique() if len(pages) > 1 else pages[0].long()


def due_runs(
    common: CommonAttentionMetadata,
    found: list[tuple[int, int]],
    *,
    length: int,
    rows: int,
    replayed: bool,
) -> DueRuns | None:
    """Runs of `length` keys and more that end in what a step writes, or did in the one before it,
    which may have been replayed; all of those in found keys. None for none.

    Args:
        found: row and number of keys, as `found_keys` gives them.
        rows: most of a sequence in a step that is replayed. The host's lengths may be too long by
            as many.
        replayed: this step may be: its own runs are due in the next, and no row of it is behind
            them.
    """
    seq_lens = host_seq_lens(common).tolist()
    counts = common.query_start_loc_cpu.diff().tolist()
    before = [n - count for n, count in zip(seq_lens, counts, strict=True)]
    known = [max(n - 2 * rows, 0) for n in before]
    for row, _ in found:
        known[row] = 0
    ends = before if replayed else seq_lens
    if all(a // length == b // length for a, b in zip(known, ends, strict=True)):
        return None
    return DueRuns(common.block_table_tensor, ends, known)
