"""What a step decides once for all layers: which rows read what, and where runs of keys lie."""

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
