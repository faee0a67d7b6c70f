"""HiP attention has no gradient; asking for one raises an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hipserve.errors import ArgumentError


def without_gradient(out: Tensor, *inputs: Tensor) -> Tensor:
    """`out`, which was computed from `inputs`; `backward` through it raises ArgumentError.

    Otherwise gradients would silently lack what goes through attention.

    out: `[batch, query_len, num_q_heads, head_dim]`; it is returned as it is, or as a view.
    inputs: of any shape.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return out
    tracked = [x for x in inputs if x.requires_grad]
    return _Refusal.apply(out.detach(), *tracked) if tracked else out  # pyright: ignore


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *_: Tensor) -> Tensor:  # type: ignore[override] # noqa: ARG004
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # type: ignore[override] # noqa: ARG004
        raise ArgumentError(
            "backward",
            "no gradient through HiP attention, which is for inference",
            "a tensor that needs one",
            'call it under torch.no_grad(), or train with attn_implementation="sdpa"',
        )
