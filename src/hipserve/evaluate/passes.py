"""Forward passes that every measurement shares: long prefill in chunks, then given tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from hipserve.integrations.transformers import HiPCache
from hipserve.models import LoadedModel

CHUNK = 4096


def make_cache(loaded: LoadedModel) -> Cache:
    """The cache that goes with the model's attention."""
    config = loaded.model.config
    pruned = config._attn_implementation == "hip"
    return HiPCache(config) if pruned else DynamicCache(config=config)


def prefill(loaded: LoadedModel, ids: Tensor, cache: Cache) -> Iterator[tuple[int, Tensor]]:
    """Reads `ids` `[1, tokens]`; yields the first position and the logits of every chunk."""
    for start in range(0, ids.shape[1], CHUNK):
        chunk = ids[:, start : start + CHUNK]
        yield start, loaded.model(chunk, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def greedy_hits(
    loaded: LoadedModel, prompts: Sequence[Tensor], answers: Sequence[Tensor]
) -> list[list[bool]]:
    """For each token of each answer `[tokens]`: is it the likeliest after its prompt and those
    before it?

    Prompts `[1, tokens]` are prefilled and answers decoded token by token, as generation would; all
    hits mean that greedy decoding gives exactly this answer. What several prompts begin with is
    read once.
    """
    cache, hits = make_cache(loaded), list[list[bool]]()
    shared = _common_prefix(prompts) if len(prompts) > 1 else 0
    _read(loaded, prompts[0][:, :shared], cache)
    for prompt, answer in zip(prompts, answers, strict=True):
        if hits:
            try:
                cache.crop(shared - cache.get_seq_length())
            except RuntimeError:  # layers with a sliding window of their own forget what they left
                cache = make_cache(loaded)
                _read(loaded, prompt[:, :shared], cache)
        logits, found = _read(loaded, prompt[:, shared:], cache), list[bool]()
        for token in answer:
            found.append(bool(logits[0, -1].argmax() == token))
            logits = _read(loaded, token.view(1, 1), cache)
        hits.append(found)
    return hits


def _read(loaded: LoadedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Reads `ids` `[1, tokens]`; the logits behind the last of them."""
    logits = torch.empty(0)
    for chunk in ids.split(CHUNK, dim=1) if ids.numel() else ():
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        logits = loaded.model(chunk, **options).logits
    return logits


def _common_prefix(prompts: Sequence[Tensor]) -> int:
    """Tokens that all prompts begin with; one at least is left to each of them."""
    shortest = min(prompt.shape[1] for prompt in prompts) - 1
    rows = torch.cat([prompt[:, :shortest] for prompt in prompts])
    return int((rows == rows[0]).all(0).int().cumprod(0).sum())
