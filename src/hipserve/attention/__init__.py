"""One attention layer, whole: select, attend, and when to select again."""

from hipserve.attention.hip import hip_attention
from hipserve.attention.layer import SelectionReuse, attend
from hipserve.attention.requests import (
    CapturedPlan,
    DecodeBuffers,
    RefreshSchedule,
    RequestSelections,
    SequenceStep,
    StepPlan,
    split_batch,
)
from hipserve.attention.sinks import absorb_sinks

__all__ = [
    "CapturedPlan",
    "DecodeBuffers",
    "RefreshSchedule",
    "RequestSelections",
    "SelectionReuse",
    "SequenceStep",
    "StepPlan",
    "absorb_sinks",
    "attend",
    "hip_attention",
    "split_batch",
]
