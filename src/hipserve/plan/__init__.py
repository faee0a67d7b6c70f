"""What a step decides once for all layers: which rows read what, and where runs of keys lie.

Names are loaded on first use: runs and parts of an index are arithmetic and need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hipserve.lazy import loader as _loader

if TYPE_CHECKING:
    from hipserve.plan.layout import BatchLayout
    from hipserve.plan.refresh import RefreshSchedule, SequenceStep
    from hipserve.plan.rule import PruningRule, dense_rows, pruning_rule
    from hipserve.plan.runs import bound_levels, bound_offsets, kept_runs, runs_of_pages
    from hipserve.plan.steps import CapturedPlan, DecodeBuffers, StepPlan, split_batch

__all__ = [
    "BatchLayout",
    "CapturedPlan",
    "DecodeBuffers",
    "PruningRule",
    "RefreshSchedule",
    "SequenceStep",
    "StepPlan",
    "bound_levels",
    "bound_offsets",
    "dense_rows",
    "kept_runs",
    "pruning_rule",
    "runs_of_pages",
    "split_batch",
]

_HOMES = {
    "layout": ["BatchLayout"],
    "refresh": ["RefreshSchedule", "SequenceStep"],
    "rule": ["PruningRule", "dense_rows", "pruning_rule"],
    "runs": ["bound_levels", "bound_offsets", "kept_runs", "runs_of_pages"],
    "steps": ["CapturedPlan", "DecodeBuffers", "StepPlan", "split_batch"],
}

__getattr__ = _loader(
    __name__, {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}
)
