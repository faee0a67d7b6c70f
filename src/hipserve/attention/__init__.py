"""One attention layer, whole: append, select, fetch, attend, account, meter."""

from hipserve.attention.account import Account, KeyCounter
from hipserve.attention.hip import WholeKeys, hip_attention, whole_sequences
from hipserve.attention.layer import AttentionLayer, HeldKeys, LayerKeys
from hipserve.attention.meter import Meter, UnreadMass
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
    "Meter",
    "RequestSelections",
    "Search",
    "SelectionReuse",
    "Selections",
    "StepSelections",
    "UnreadMass",
    "WholeKeys",
    "absorb_sinks",
    "hip_attention",
    "whole_sequences",
]
