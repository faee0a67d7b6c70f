"""Attention sinks that a model has learned: a logit for each query head, without a key."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops import checks


def absorb_sinks(
    out: Tensor, lse: Tensor, sink_logits: Tensor, *, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention as if the softmax had had one more column, whose value is zero.

    The column takes its share of the weights and adds nothing: the output is multiplied by
    `sigmoid(lse - sink_logits)`. GPT-OSS and Granite have such sinks. They are not keys, unlike
    those of `num_sink_tokens`.

    >>> out, lse = absorb_sinks(torch.ones(1, 1, 2), torch.zeros(1, 1), torch.zeros(1))
    >>> out.tolist(), round(float(lse), 4)
    ([[[0.5, 0.5]]], 0.6931)

    Args:
        out: `[..., num_q_heads, head_dim]`, attention without the sinks.
        lse: `[..., num_q_heads]`, its log-sum-exp; -inf in rows that see no key.
        sink_logits: `[num_q_heads]`, in the scale of the scores after `sm_scale` and softcap; -inf
            is no sink.
        check: False skips the checks, for callers that have made them.

    Returns:
        out in its dtype, zeros where no key is seen; and the log-sum-exp with the sink counted in,
        in the dtype of `lse`.

    Raises:
        ArgumentError: the shapes do not fit each other.
    """
    if check:
        _check(out, lse, sink_logits)
    logits = sink_logits.to(lse.dtype)
    # -inf against -inf, no key and no sink, is NaN: nothing is left there either.
    share = (lse - logits).sigmoid().nan_to_num(nan=0.0)
    return (out * share[..., None]).to(out.dtype), torch.logaddexp(lse, logits)


def _check(out: Tensor, lse: Tensor, sink_logits: Tensor) -> None:
    checks.check_tensor("sink_logits", sink_logits, "[num_q_heads]")
    heads, rows = list(sink_logits.shape), list(out.shape[:-1])
    fits = rows[-1:] == heads
    checks.require(fits, "sink_logits", f"shape {rows[-1:]}, a logit a query head", heads)
    checks.require(list(lse.shape) == rows, "lse", f"shape {rows}", list(lse.shape))
