"""Tokens that need far context: pruning can hurt these alone, and the others dilute what it does.

LongPPL (arXiv 2410.23771) counts tokens that a long context makes much likelier than a short one,
and likely. The short context here is one to two times `NEAR` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.lab.quality.beside import read_reference
from hipserve.models import LoadedModel

NEAR = 1024
"""Tokens of near context, or a quarter of a text that is shorter than four times as many."""
GAIN, LIKELY = 2.0, -2.0
"""Nats that far context adds at least, and log-probability that it leads to at least."""


def far_tokens(loaded: LoadedModel, ids: Tensor, first: int, nll: Tensor) -> Tensor:
    """Which tokens of `ids` `[1, tokens]` from position `first` on need far context.

    `nll` `[tokens - first]`: their nats after all that comes before them, under the attention that
    is on now.

    Returns:
        `[tokens - first]` bool.
    """
    near = read_near(loaded, ids, first)
    return (near - nll > GAIN) & (-nll > LIKELY)


def read_near(loaded: LoadedModel, ids: Tensor, first: int) -> Tensor:
    """`[tokens - first]` float32 nats of the tokens of `ids` `[1, tokens]`, each after its near
    context only."""
    length = ids.shape[1]
    near = min(NEAR, max(length // 4, 1))
    parts: list[Tensor] = []
    for start in range(first, length, near):
        begin = max(start - near, 0)
        window = ids[:, begin : start + near]
        parts.append(read_reference(loaded, window, start - begin).nll)
    return torch.cat(parts)
