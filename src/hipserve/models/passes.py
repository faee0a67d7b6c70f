"""Forward passes over a cache: the one loop that reads a long prompt, and truncation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from transformers import Cache, DynamicCache

from hipserve.integrations.transformers import HiPCache
from hipserve.models.loading import LoadedModel
from hipserve.offload import Offload

CHUNK = 4096
"""Rows of one prefill step: enough to fill the cores, little enough to show progress."""

OFFLOADED_CHUNK = 16384
"""The same where a GPU is lent the keys and values of all that came before, in every step."""

WINDOWED_CHUNK = 1024
"""The same where SDPA reads layers with a window."""


class Pass(NamedTuple):
    """One step of reading.

    Attributes:
        stop: positions that the cache holds now.
        logits: `[1, rows, words]`, of the last `rows` of them.
    """

    stop: int
    logits: Tensor


def make_cache(loaded: LoadedModel, offload: Offload | None = None) -> Cache:
    """The cache that goes with the model's attention; a HiPCache offloads."""
    config = loaded.model.config
    pruned = config._attn_implementation == "hip"
    return HiPCache(config, offload=offload) if pruned else DynamicCache(config=config)


def read(
    loaded: LoadedModel,
    ids: Tensor,
    cache: Cache,
    *,
    rows: int | None = None,
    first: int | None = None,
) -> Iterator[Pass]:
    """Reads `ids` `[1, tokens]` behind what the cache holds, chunk by chunk.

    Chunks end at multiples of `rows` positions (`CHUNK` or `WINDOWED_CHUNK` if None), as those of
    one pass over everything do. Logits are made from position `first` on, and always of a chunk's
    last row.
    """
    rows = rows or _chunk(cache)
    begin = start = cache.get_seq_length()
    end = begin + ids.shape[1]
    while start < end:
        stop = min((start // rows + 1) * rows, end)
        count = 1 if first is None else max(stop - max(start, first), 1)
        chunk = ids[:, start - begin : stop - begin]
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": count}
        yield Pass(stop, loaded.model(chunk, **options).logits)
        start = stop


def _chunk(cache: Cache) -> int:
    """Tokens of a chunk; fewer where SDPA computes all of a chunk and the window before it."""
    layers = () if isinstance(cache, HiPCache) else cache.layers
    windowed = any(getattr(layer, "is_sliding", False) for layer in layers)
    return WINDOWED_CHUNK if windowed else CHUNK


def shorten(cache: Cache, length: int) -> bool:
    """Drops what the cache holds beyond `length` tokens.

    False where that is impossible: layers with a sliding window forget what left it.
    """
    surplus = cache.get_seq_length() - length
    try:
        if surplus > 0:
            cache.crop(-surplus)
    except RuntimeError:
        return False
    return True
