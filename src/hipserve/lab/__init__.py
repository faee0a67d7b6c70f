"""The laboratory: quality and speed of pruned attention compared with dense attention.

No number comes without a numeric check or an interval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hipserve.lazy import loader as _loader

if TYPE_CHECKING:
    from hipserve.lab.calibration.card import rule_card
    from hipserve.lab.calibration.measure import Calibration, calibrate
    from hipserve.lab.drift.measure import DriftReport, evaluate_drift
    from hipserve.lab.quality.depth import DepthReport, evaluate_depths
    from hipserve.lab.quality.fidelity import FidelityReport, evaluate_fidelity
    from hipserve.lab.quality.perplexity import PerplexityReport, evaluate_perplexity
    from hipserve.lab.quality.retrieval import RetrievalReport, evaluate_retrieval
    from hipserve.lab.quality.tasks import TASKS, make_sample
    from hipserve.lab.speed.attention import bench_attention
    from hipserve.lab.speed.inputs import LayerShape
    from hipserve.lab.speed.report import AttentionReport, Phase, Point, fit_exponent
    from hipserve.lab.speed.timing import Clock, Limits
    from hipserve.lab.text import Document, read_documents

__all__ = [
    "TASKS",
    "AttentionReport",
    "Calibration",
    "Clock",
    "DepthReport",
    "Document",
    "DriftReport",
    "FidelityReport",
    "LayerShape",
    "Limits",
    "PerplexityReport",
    "Phase",
    "Point",
    "RetrievalReport",
    "bench_attention",
    "calibrate",
    "evaluate_depths",
    "evaluate_drift",
    "evaluate_fidelity",
    "evaluate_perplexity",
    "evaluate_retrieval",
    "fit_exponent",
    "make_sample",
    "read_documents",
    "rule_card",
]

__getattr__ = _loader(
    __name__,
    {
        "AttentionReport": "hipserve.lab.speed.report",
        "Calibration": "hipserve.lab.calibration.measure",
        "Clock": "hipserve.lab.speed.timing",
        "DepthReport": "hipserve.lab.quality.depth",
        "Document": "hipserve.lab.text",
        "DriftReport": "hipserve.lab.drift.measure",
        "FidelityReport": "hipserve.lab.quality.fidelity",
        "LayerShape": "hipserve.lab.speed.inputs",
        "Limits": "hipserve.lab.speed.timing",
        "PerplexityReport": "hipserve.lab.quality.perplexity",
        "Phase": "hipserve.lab.speed.report",
        "Point": "hipserve.lab.speed.report",
        "RetrievalReport": "hipserve.lab.quality.retrieval",
        "TASKS": "hipserve.lab.quality.tasks",
        "bench_attention": "hipserve.lab.speed.attention",
        "calibrate": "hipserve.lab.calibration.measure",
        "evaluate_depths": "hipserve.lab.quality.depth",
        "evaluate_drift": "hipserve.lab.drift.measure",
        "evaluate_fidelity": "hipserve.lab.quality.fidelity",
        "evaluate_perplexity": "hipserve.lab.quality.perplexity",
        "evaluate_retrieval": "hipserve.lab.quality.retrieval",
        "fit_exponent": "hipserve.lab.speed.report",
        "make_sample": "hipserve.lab.quality.tasks",
        "read_documents": "hipserve.lab.text",
        "rule_card": "hipserve.lab.calibration.card",
    },
)
