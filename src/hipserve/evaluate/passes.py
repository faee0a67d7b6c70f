"""Forward passes that every measurement shares: long prefill in chunks, then given tokens."""

from __future__ import annotations

from collections.abc import Iterator

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
def greedy_hits(loaded: LoadedModel, prompt: Tensor, answer: Tensor) -> list[bool]:
    """For each token of `answer` `[tokens]`: is it the likeliest after prompt and those before it?

    The prompt is prefilled and the answer decoded token by token, as generation would; all hits
    mean that greedy decoding gives exactly this answer.
    """
    cache, logits = make_cache(loaded), None
    for start in range(0, prompt.shape[1], CHUNK):
        chunk = prompt[:, start : start + CHUNK]
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        logits = loaded.model(chunk, **options).logits
    hits: list[bool] = []
    for token in answer:
        assert logits is not None
        hits.append(bool(logits[0, -1].argmax() == token))
        logits = loaded.model(token.view(1, 1), past_key_values=cache, use_cache=True).logits
    return hits
