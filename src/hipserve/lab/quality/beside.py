"""Token by token: one attention beside another, without the logits of a text ever being kept.

The states before the model's head are kept of the reference, `[1, tokens, hidden]`. Another pass
hands them to its own head together with its own states, chunk by chunk: both logits stand beside
each other for the rows of one chunk, computed by the model itself, and are forgotten with it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from hipserve.errors import ArgumentError
from hipserve.lab.quality.passes import prefill, skip
from hipserve.models import LoadedModel
from hipserve.models.passes import make_cache


class Reference(NamedTuple):
    """One text under the attention that others are compared with.

    Attributes:
        nll: `[tokens]` float32 nats of each token, on the CPU.
        states: `[1, tokens, hidden]` what the head makes their logits of.
    """

    nll: Tensor
    states: Tensor


class Tokens(NamedTuple):
    """The same tokens under another attention, each `[tokens]` on the CPU.

    Attributes:
        nll: float32 nats.
        kl: float32 nats, the divergence KL(reference || this) of the distributions of the token.
        same: bool, both have the same likeliest token.
    """

    nll: Tensor
    kl: Tensor
    same: Tensor


@torch.no_grad()
def read_reference(loaded: LoadedModel, ids: Tensor, first: int) -> Reference:
    """Tokens of `ids` `[1, tokens]` from position `first` on."""
    cache, nll, states = make_cache(loaded), list[Tensor](), list[Tensor]()
    skip(loaded, ids, cache, first - 1)
    with _head_inputs(loaded, lambda rows: states.append(rows.clone())):
        for start, logits in prefill(loaded, ids, cache, first - 1):
            targets = _targets(ids, start, logits)
            nll.append(
                F.cross_entropy(logits[0, : len(targets)].float(), targets, reduction="none")
            )
    return Reference(torch.cat(nll).cpu(), torch.cat(states, dim=1))


@torch.no_grad()
def read_beside(
    loaded: LoadedModel,
    ids: Tensor,
    first: int,
    reference: Reference,
    rows: int | None = None,
    cache: Cache | None = None,
) -> Tokens:
    """The same tokens of `ids` `[1, tokens]` under the attention that is on now.

    Args:
        rows: of a chunk, a multiple of the query block; as many as memory allows if None.
        cache: an empty one; made if None.
    """
    cache = make_cache(loaded) if cache is None else cache
    parts, done = list[Tokens](), 0

    def add(own: Tensor) -> Tensor:
        nonlocal done
        theirs = reference.states[:, done : done + own.shape[1]]
        done += own.shape[1]
        return torch.cat([own, theirs], dim=1)

    skip(loaded, ids, cache, first - 1, beside=2, rows=rows)
    with _head_inputs(loaded, add):
        for start, logits in prefill(loaded, ids, cache, first - 1, beside=2, rows=rows):
            own, theirs = logits[0].chunk(2)
            targets = _targets(ids, start, own[None])
            parts.append(_compare(own[: len(targets)], theirs[: len(targets)], targets))
    nll, kl, same = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Tokens(nll, kl, same)


def _compare(own: Tensor, theirs: Tensor, targets: Tensor) -> Tokens:
    """Logits `[rows, words]` of both, and the tokens `[rows]` that follow."""
    same = own.argmax(-1) == theirs.argmax(-1)
    log_q, log_p = own.float().log_softmax(-1), theirs.float().log_softmax(-1)
    nll = -log_q.gather(1, targets[:, None])[:, 0]
    return Tokens(nll, (log_p.exp() * (log_p - log_q)).sum(-1), same)


def _targets(ids: Tensor, start: int, logits: Tensor) -> Tensor:
    """The tokens that rows from `start` on should foretell; nothing follows the last of all."""
    return ids[0, start + 1 : start + 1 + logits.shape[1]]


@contextmanager
def _head_inputs(loaded: LoadedModel, edit: Callable[[Tensor], Any]) -> Generator[None]:
    """Shows `edit` what the head reads, `[1, rows, hidden]`, and gives it what `edit` returns."""
    head = loaded.model.get_output_embeddings()
    if head is None:
        raise ArgumentError("model", "one whose output embeddings are a module", loaded.name)

    def show(_: Any, inputs: tuple[Tensor, ...]) -> Any:
        return edit(inputs[0])

    handle = head.register_forward_pre_hook(show)
    try:
        yield
    finally:
        handle.remove()
