"""Speed of the operations beside dense attention; no number without a numeric check."""

from hipserve.bench.inputs import LayerShape, make_decode, make_prefill

__all__ = ["LayerShape", "make_decode", "make_prefill"]
