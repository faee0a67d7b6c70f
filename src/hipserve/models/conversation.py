"""A conversation about a long document: prefill in chunks, answers as they come, what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, TextStreamer

from hipserve.attention import UnreadMass
from hipserve.errors import ArgumentError
from hipserve.integrations.transformers import HiPCache
from hipserve.integrations.transformers.settings import config_of
from hipserve.models.loading import LoadedModel, Turn
from hipserve.models.passes import OFFLOADED_CHUNK, make_cache, read, shorten
from hipserve.offload import Offload

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What one answer cost.

    Attributes:
        prompt_tokens: tokens of the whole conversation so far.
        cached_tokens: those whose keys were in the cache already.
        new_tokens: tokens of the answer.
        first_token_seconds: from the question to the first token of the answer.
        decode_seconds: from the first to the last token.
        prefill_share, decode_share: keys read, of those that dense attention reads.
        unread: by layer, an estimate of the share of attention that pruned rows left unread; empty
            unless the configuration has `meter = "sampled"`, or where no row was metered.
        cache_bytes: keys, values and index of all paged layers.
        offloaded_bytes: those of them in host memory or in a file.
        tiles_needed, tiles_loaded: tiles of offloaded keys and values that steps needed on a GPU,
            and those that were not there.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_token_seconds: float
    decode_seconds: float
    prefill_share: float
    decode_share: float
    cache_bytes: int
    offloaded_bytes: int = 0
    tiles_needed: int = 0
    tiles_loaded: int = 0
    unread: dict[int, float] = field(default_factory=dict[int, float])

    @property
    def tiles_found(self) -> float:
        """Share of the tiles that were on the GPU when a step needed them."""
        return 1 - self.tiles_loaded / max(self.tiles_needed, 1)

    @property
    def decode_tokens_per_second(self) -> float:
        steps = max(self.new_tokens - 1, 0)
        return steps / self.decode_seconds if steps and self.decode_seconds else 0.0


class Conversation:
    """Turns with one model over one cache: a follow-up question reads only what is new.

    >>> from hipserve.models import Conversation, load
    >>> talk = Conversation(load())
    >>> talk.say("Read the text.\\n\\nThe pass key is 83724. Remember it. 83724 is the pass key.")
    >>> talk.ask("What is the pass key?")
    'The pass key is 83724.'
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        system: str = "",
        pin_system: bool = False,
        offload: Offload | None = None,
    ) -> None:
        """Begins a conversation.

        Args:
            system: the system prompt; none if empty.
            pin_system: every row reads the system prompt, however long the conversation: the sinks
                of the model's attention cover it from now on, in other conversations as well.
            offload: where keys and values are kept apart from the model, as in `HiPCache`.

        Raises:
            ArgumentError: there is no system prompt to pin, or the search reads what is offloaded.
            FitError: `offload` asks for more than there is.
        """
        self.loaded = loaded
        self.turns: list[Turn] = [{"role": "system", "content": system}] if system else []
        if pin_system:
            self._pin(system)
        self.statistics: Statistics | None = None
        self._ids = torch.empty(1, 0, dtype=torch.long, device=loaded.device)
        self._offload = offload
        self._begin()

    def _begin(self) -> None:
        """An empty cache. The one before is gone first: there may be no room for two."""
        self._cache: Cache = DynamicCache()
        self._cache = make_cache(self.loaded, self._offload)

    def _pin(self, system: str) -> None:
        if not system:
            raise ArgumentError("pin_system", "a system prompt", "none", "give one as system")
        settings = self.loaded.model.config
        if settings._attn_implementation == "hip":
            self.loaded.use(config_of(settings).pin(self.loaded.system_tokens(system)))

    def say(self, content: str) -> None:
        """Adds a user's turn that needs no answer yet, such as the document."""
        self.turns.append({"role": "user", "content": content})

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
        on_prefill: Progress | None = None,
        **options: Any,
    ) -> str:
        """The model's answer; `statistics` has its cost.

        Args:
            max_new_tokens: most tokens of the answer.
            on_text: receives the answer piece by piece.
            on_prefill: receives tokens read and tokens to read after every chunk.
            options: for `model.generate`, such as `do_sample=True, temperature=0.7`.

        Raises:
            FitError: conversation and answer exceed the model's context; nothing was read.
        """
        turns = [*self.turns, {"role": "user", "content": question}]
        ids = self.loaded.encode(turns)
        self.loaded.check_fit(ids.shape[1], max_new_tokens)
        began = time.perf_counter()
        cached = self._keep_common_prefix(ids)
        before, loads, unread = self._keys(), self._loads(), self._unread()
        watch = _Watch(self.loaded.tokenizer, on_text)
        try:
            self._prefill(ids, on_prefill)
            middle = self._keys()
            new = self._generate(ids, watch, max_new_tokens, options)
        except BaseException:  # layers may hold different keys now
            self._ids = self._ids[:, :0]
            self._begin()
            raise
        self._ids = torch.cat([ids, new[:, :-1]], dim=1)
        after, tiles = self._keys(), self._loads()
        text = self.loaded.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        self.turns = [*turns, {"role": "assistant", "content": text}]
        self.statistics = Statistics(
            prompt_tokens=ids.shape[1],
            cached_tokens=cached,
            new_tokens=new.shape[1],
            first_token_seconds=watch.first - began,
            decode_seconds=watch.last - watch.first,
            prefill_share=_share(before, middle),
            decode_share=_share(middle, after),
            cache_bytes=_nbytes(self._cache),
            offloaded_bytes=self._cache.host_nbytes if isinstance(self._cache, HiPCache) else 0,
            tiles_needed=tiles[0] - loads[0],
            tiles_loaded=tiles[1] - loads[1],
            unread={
                layer: mass.since(unread[layer]).mean
                for layer, mass in self._unread().items()
                if mass.count > unread[layer].count
            },
        )
        return text

    def _keep_common_prefix(self, ids: torch.Tensor) -> int:
        """Drops what the cache holds beyond the tokens that `ids` begins with."""
        common = min(self._ids.shape[1], ids.shape[1] - 1)
        same = (self._ids[0, :common] == ids[0, :common]).int().cumprod(0)
        keep = int(same.sum())
        if shorten(self._cache, keep):
            return keep
        self._begin()
        return 0

    @torch.inference_mode()
    def _prefill(self, ids: torch.Tensor, on_prefill: Progress | None) -> None:
        """Reads all but the last token, which `generate` reads."""
        begin, end = self._cache.get_seq_length(), ids.shape[1] - 1
        rows = OFFLOADED_CHUNK if self._offload and self.loaded.device.type == "cuda" else None
        for step in read(self.loaded, ids[:, begin:end], self._cache, rows=rows):
            if on_prefill:
                on_prefill(step.stop - begin, end - begin)

    def _generate(
        self, ids: torch.Tensor, watch: _Watch, max_new_tokens: int, options: dict[str, Any]
    ) -> torch.Tensor:
        stops = list(self.loaded.stop_strings) or None
        out = self.loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            max_new_tokens=max_new_tokens,
            streamer=watch,
            stop_strings=stops,
            tokenizer=self.loaded.tokenizer if stops else None,
            **{"do_sample": False, **options},
        )
        return cast("torch.Tensor", out)[:, ids.shape[1] :]

    def _keys(self) -> tuple[float, float]:
        return self._cache.count_keys() if isinstance(self._cache, HiPCache) else (0.0, 0.0)

    def _unread(self) -> dict[int, UnreadMass]:
        return self._cache.unread_mass() if isinstance(self._cache, HiPCache) else {}

    def _loads(self) -> tuple[int, int]:
        return self._cache.count_loads() if isinstance(self._cache, HiPCache) else (0, 0)


class _Watch(TextStreamer):
    """Hands text on as `generate` makes it and notes when the first and last token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.first = self.last = 0.0

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        if self._on_text and text:
            self._on_text(text)


def _share(before: tuple[float, float], after: tuple[float, float]) -> float:
    read, visible = after[0] - before[0], after[1] - before[1]
    return read / visible if visible else 1.0


def _nbytes(cache: Cache) -> int:
    if isinstance(cache, HiPCache):
        return cache.nbytes
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
