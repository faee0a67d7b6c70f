"""Forward passes that measurements of quality share: logits of a text, and given answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from hipserve.attention.crossover import rule_for
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, FitError
from hipserve.lab.text import Document
from hipserve.models import LoadedModel, passes
from hipserve.models.passes import make_cache, read, shorten
from hipserve.plan import PruningRule

LOGITS_BYTES = 256 << 20
"""Bound on the float32 logits of one forward pass: 4,096 rows of 262,144 words would be 4 GiB."""


CUDA_FACTOR = 4
"""As many times as much on a GPU, where small chunks leave it idle."""

LONGEST, FEWEST = 1 << 20, 64
"""Tokens and keys between which a hint looks for numbers to try."""


def skip(
    loaded: LoadedModel,
    ids: Tensor,
    cache: Cache,
    first: int,
    *,
    beside: int = 1,
    rows: int | None = None,
) -> None:
    """Reads the chunks of `ids` `[1, tokens]` that end before position `first`."""
    step = rows or _logit_rows(loaded, beside)
    last_logits(loaded, ids[:, : first - first % step], cache, rows)


def prefill(
    loaded: LoadedModel,
    ids: Tensor,
    cache: Cache,
    first: int = 0,
    *,
    beside: int = 1,
    rows: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Reads on in `ids` `[1, tokens]`; yields positions from `first` on with the logits behind
    them.

    Args:
        beside: logits that are made for each position.
        rows: of a chunk; as many as `LOGITS_BYTES` allow if None.
    """
    step = rows or _logit_rows(loaded, beside)
    rest = ids[:, cache.get_seq_length() :]
    for stop, logits in read(loaded, rest, cache, rows=step, first=first):
        yield stop - logits.shape[1] // beside, logits


def _logit_rows(loaded: LoadedModel, beside: int) -> int:
    """Rows of a chunk whose logits keep to `LOGITS_BYTES`: a power of two, from 64 to `CHUNK`."""
    words = loaded.model.config.get_text_config().vocab_size * beside
    factor = CUDA_FACTOR if loaded.device.type == "cuda" else 1
    rows = max(LOGITS_BYTES * factor // (4 * words), 64)
    return min(1 << (rows.bit_length() - 1), passes.CHUNK)


def check_length(loaded: LoadedModel, length: int) -> None:
    """Raises FitError where a measurement of `length` tokens exceeds the model's context."""
    if length > loaded.max_context:
        raise FitError(
            f"a length of {length:,} tokens does not fit {loaded.name}: its context is "
            f"{loaded.max_context:,}",
            "lower the length, or extend the model (--extend stream)",
        )


def check_span(loaded: LoadedModel, length: int, first: int | None) -> int:
    """The first position that counts; a quarter of `length` if None.

    Raises:
        ArgumentError: nothing is left to measure.
        FitError: `length` exceeds the model's context.
    """
    if length < 2:
        raise ArgumentError("length", "2 tokens or more", str(length))
    check_length(loaded, length)
    first = length // 4 if first is None else first
    if not 0 < first < length:
        raise ArgumentError("first", f"a position from 1 to {length - 1}", str(first))
    return first


def encode_documents(
    loaded: LoadedModel, documents: Sequence[Document], length: int
) -> dict[Document, Tensor]:
    """The first `length` tokens, `[1, length]`, of each document that has so many.

    Raises:
        FitError: none has.
    """
    options = {"return_tensors": "pt", "truncation": True, "max_length": length}
    encoded = {doc: loaded.tokenizer(doc.text, **options)["input_ids"] for doc in documents}
    kept = {doc: ids.to(loaded.device) for doc, ids in encoded.items() if ids.shape[1] == length}
    if not kept:
        longest = max((ids.shape[1] for ids in encoded.values()), default=0)
        raise FitError(
            f"nothing to measure in {length:,} tokens: the longest document has {longest:,}",
            "lower the length or give longer texts",
        )
    return kept


def rule_of_model(loaded: LoadedModel, config: HiPConfig) -> PruningRule:
    """The rule of its attention layers on this machine."""
    text = loaded.model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    group = text.num_attention_heads // heads
    return rule_for(config, loaded.device, loaded.model.dtype, loaded.head_dim, group)


def may_prune(loaded: LoadedModel, config: HiPConfig | None, length: int) -> bool:
    """Does any layer leave keys out at the end of `length` tokens?"""
    if config is None:
        return False
    text = loaded.model.config.get_text_config()
    count, window = text.num_hidden_layers, getattr(text, "sliding_window", None) or length
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * count
    rule = rule_of_model(loaded, config)
    visible = [length if kind == "full_attention" else min(length, window) for kind in kinds]
    return any(
        rule.prunes(keys - 1, config.query_block_size)
        for layer, keys in enumerate(visible)
        if layer not in config.dense_layers
    )


def numbers_to_try(
    config: HiPConfig,
    length: int,
    prunes: Callable[[HiPConfig, int], bool],
    longest: int = LONGEST,
) -> str:
    """A hint for where nothing is pruned: the next powers of two that would change it.

    Args:
        prunes: whether a configuration prunes in so many tokens.
        longest: the model's context.
    """
    lengths = (1 << n for n in range(length.bit_length(), longest.bit_length()))
    budgets = (1 << n for n in reversed(range((config.budget - 1).bit_length())))
    aligned = (b for b in budgets if b >= FEWEST and b % config.granularity == 0)
    longer = next((n for n in lengths if prunes(config, n)), None)
    smaller = next((b for b in aligned if prunes(config.replace(budget=b), length)), None)
    found = [f"a length of {longer:,} tokens"] if longer else []
    found += [f"--budget {smaller}"] if smaller else []
    return f"try {' or '.join(found or ['a longer length with a smaller --budget'])}"


class Answer(NamedTuple):
    """What a model makes of an answer that it is given.

    Attributes:
        hits: of each token, is it the likeliest after the prompt and the tokens before it?
        nats: log-probability of all tokens together.
    """

    hits: list[bool]
    nats: float


@torch.no_grad()
def read_answers(
    loaded: LoadedModel, prompts: Sequence[Tensor], answers: Sequence[Tensor]
) -> list[Answer]:
    """How likely each answer `[tokens]` is after its prompt.

    Prompts `[1, tokens]` are prefilled and answers decoded token by token, as generation would; all
    hits mean that greedy decoding gives exactly this answer. What several prompts begin with is
    read once.
    """
    cache, found = make_cache(loaded), list[Answer]()
    shared = _common_prefix(prompts) if len(prompts) > 1 else 0
    last_logits(loaded, prompts[0][:, :shared], cache)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        branch = cache if i == len(prompts) else _branch(cache)
        rows = [last_logits(loaded, prompt[:, shared:], branch)]
        rows += [last_logits(loaded, token.view(1, 1), branch) for token in answer]
        found.append(_answer(torch.cat(rows[:-1], dim=1)[0], answer))
        if branch is cache and i < len(prompts):
            shorten(cache, shared)
    return found


def greedy_hits(
    loaded: LoadedModel, prompts: Sequence[Tensor], answers: Sequence[Tensor]
) -> list[list[bool]]:
    """The hits of `read_answers`, for prompts `[1, tokens]` and answers `[tokens]`."""
    return [answer.hits for answer in read_answers(loaded, prompts, answers)]


def _answer(logits: Tensor, tokens: Tensor) -> Answer:
    """The answer by logits `[tokens, words]`, each row before its token."""
    likely = logits.float().log_softmax(-1).gather(1, tokens[:, None])
    return Answer((logits.argmax(-1) == tokens).tolist(), float(likely.sum()))


def _branch(cache: Cache) -> Cache:
    """The cache itself where it can be cropped to what it holds now, else a copy: layers with a
    window of their own forget what they left."""
    windowed = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
    return copy.deepcopy(cache) if windowed else cache


def last_logits(loaded: LoadedModel, ids: Tensor, cache: Cache, rows: int | None = None) -> Tensor:
    """Reads `ids` `[1, tokens]`; the logits behind the last of them, `[1, 1, words]`."""
    logits = torch.empty(0)
    for step in read(loaded, ids, cache, rows=rows):
        logits = step.logits
    return logits


def _common_prefix(prompts: Sequence[Tensor]) -> int:
    """Tokens that all prompts begin with; each keeps one token or more of its own."""
    shortest = min(prompt.shape[1] for prompt in prompts) - 1
    rows = torch.cat([prompt[:, :shortest] for prompt in prompts])
    return int((rows == rows[0]).all(0).int().cumprod(0).sum())
