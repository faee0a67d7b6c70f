"""Speed of the operations beside dense attention; no number without a numeric check."""

from hipserve.bench.attention import bench_attention
from hipserve.bench.inputs import LayerShape
from hipserve.bench.report import AttentionReport, Phase, Point, fit_exponent
from hipserve.bench.timing import Clock, Limits

__all__ = [
    "AttentionReport",
    "Clock",
    "LayerShape",
    "Limits",
    "Phase",
    "Point",
    "bench_attention",
    "fit_exponent",
]
