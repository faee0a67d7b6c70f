"""One attention layer, whole: append, select, fetch, attend, account."""

from hipserve.attention.account import Account, KeyCounter
from hipserve.attention.hip import WholeKeys, hip_attention, whole_sequences
from hipserve.attention.layer import AttentionLayer, HeldKeys, LayerKeys
from hipserve.attention.selections import (
    RequestSelections,
    Search,
    SelectionReuse,
    Selections,
    StepSelections,
)
from hipserve.attention.sinks import absorb_sinks

__all__ = [
    "Account",
    "AttentionLayer",
    "HeldKeys",
    "KeyCounter",
    "LayerKeys",
    "RequestSelections",
    "Search",
    "SelectionReuse",
    "Selections",
    "StepSelections",
    "WholeKeys",
    "absorb_sinks",
    "hip_attention",
    "whole_sequences",
]
