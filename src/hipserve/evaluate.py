"""`hipserve.evaluate` of 0.1: its names live in `hipserve.lab` now, and warn here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hipserve.lazy import moved as _moved

if TYPE_CHECKING:
    from hipserve.lab import (
        TASKS,
        Document,
        PerplexityReport,
        RetrievalReport,
        evaluate_perplexity,
        evaluate_retrieval,
        make_sample,
        read_documents,
    )

__all__ = [
    "TASKS",
    "Document",
    "PerplexityReport",
    "RetrievalReport",
    "evaluate_perplexity",
    "evaluate_retrieval",
    "make_sample",
    "read_documents",
]

__getattr__ = _moved(__name__, "hipserve.lab", __all__)
