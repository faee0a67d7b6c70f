"""First tokens, contrasts and answers under dense and pruned attention, context by context."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.lab.drift.contexts import BARE, PLACES, Contexts
from hipserve.lab.drift.prompts import Prompt
from hipserve.lab.drift.reads import watch
from hipserve.lab.drift.summary import Record, Summary, summarize
from hipserve.lab.drift.summary import warnings as _warnings
from hipserve.lab.quality.controls import BLIND, blind
from hipserve.lab.quality.passes import check_length, last_logits, may_prune
from hipserve.lab.text import Document
from hipserve.models import LoadedModel
from hipserve.models.passes import make_cache

DENSE, HIP, PINNED = "dense", "hip", "hip, system prompt pinned"
ANSWER = 24
"""Tokens of an answer that is checked."""
LARGE = 1_000_000_000
"""Parameters below which a model hardly refuses anything."""


@dataclass(frozen=True, slots=True)
class DriftReport:
    """What was measured.

    Attributes:
        scope: what this model can and cannot show; read it first.
        bare: every record of prompts without filler, under `HIP`: a control.
        rows: by attention, over all places and lengths, and by length.
        records: one for each prompt, place, length and attention.
    """

    model: str
    scope: str
    lengths: list[int]
    prompts: int
    config: dict[str, Any]
    bare: Summary
    rows: dict[str, Summary]
    by_length: dict[str, dict[int, Summary]]
    by_place: dict[str, dict[str, Summary]]
    by_label: dict[str, dict[str, Summary]]
    warnings: list[str]
    records: list[Record]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_drift(
    loaded: LoadedModel,
    config: HiPConfig,
    prompts: Sequence[Prompt],
    filler: Sequence[Document],
    *,
    lengths: Sequence[int],
    places: Sequence[str] = PLACES,
    dense: HiPConfig | None = None,
    progress: Callable[[str, str], None] | None = None,
) -> DriftReport:
    """Every prompt alone, and behind, inside and before filler of every length.

    Args:
        config: what is compared with dense attention, as it is and with the sinks over the system
            prompt (`HiPConfig.pin`).
        filler: texts, joined.
        lengths: tokens of whole contexts.
        places: of `PLACES`.
        dense: dense attention to long contexts by other kernels than SDPA; bare prompts are
            compared with SDPA.
        progress: receives prompt and attention before each pass.

    Raises:
        ArgumentError: no prompts, lengths or places.
        FitError: a length exceeds the model's context or the filler.
    """
    if not (prompts and lengths and places):
        raise ArgumentError("prompts", "prompts, lengths and places", "none")
    for length in lengths:
        check_length(loaded, length)
    contexts = Contexts(loaded, "\n\n".join(document.text for document in filler))
    records: list[Record] = []
    for i, prompt in enumerate(prompts):
        system = contexts.system_tokens(prompt)
        attentions = _attentions(config, system)
        for place, length, ids in _places(contexts, prompt, i, places, lengths):
            bare = place == BARE
            chosen = {DENSE: None, HIP: config} if bare else {DENSE: dense, **attentions}
            say = functools.partial(progress or _say_nothing, f"prompt {i + 1}")
            records += _compare(loaded, chosen, prompt, ids, _Key(i, place, length, system), say)
    pinned = any(record.attention == PINNED for record in records)
    names = [HIP, *([PINNED] if pinned else []), BLIND]
    bare = [record for record in records if record.place == BARE]
    far = [record for record in records if record.place != BARE]
    own = {name: [record for record in far if record.attention == name] for name in names}
    longest = max(contexts.bare(prompt).shape[1] for prompt in prompts)
    rows = {name: summarize(own[name]) for name in names}
    found = _warnings(summarize(bare), rows, pruned_bare=may_prune(loaded, config, longest))
    if not pinned and any(prompt.system for prompt in prompts):
        found.append("every system prompt fits the sinks: all rows read it, pinned or not")
    return DriftReport(
        model=loaded.name,
        scope=_scope(loaded),
        lengths=list(lengths),
        prompts=len(prompts),
        config=config.to_dict(),
        bare=summarize(bare),
        rows=rows,
        by_length={n: _by(own[n], "length") for n in names},
        by_place={n: _by(own[n], "place") for n in names},
        by_label={n: _by(own[n], "label") for n in names},
        warnings=found,
        records=records,
    )


def _say_nothing(prompt: str, name: str) -> None: ...


def _attentions(config: HiPConfig, system_tokens: int) -> dict[str, HiPConfig]:
    pinned = config.pin(system_tokens)
    own = {HIP: config} if pinned == config else {HIP: config, PINNED: pinned}
    return {**own, BLIND: blind(config)}


def _places(
    contexts: Contexts, prompt: Prompt, offset: int, places: Sequence[str], lengths: Sequence[int]
) -> Iterator[tuple[str, int, Tensor]]:
    """Place, length and tokens `[1, tokens]`, the bare prompt first."""
    ids = contexts.bare(prompt)
    yield BARE, ids.shape[1], ids
    for length in lengths:
        for place in places:
            yield place, length, contexts.make(prompt, place, length, offset)


def _by(records: Sequence[Record], field: str) -> dict[Any, Summary]:
    values = dict.fromkeys(getattr(record, field) for record in records)
    return {v: summarize([r for r in records if getattr(r, field) == v]) for v in values}


class _Key(NamedTuple):
    """A context: its prompt's number, its place and length, and the tokens of the system prompt."""

    prompt: int
    place: str
    length: int
    system: int


@torch.no_grad()
def _compare(
    loaded: LoadedModel,
    configs: dict[str, HiPConfig | None],
    prompt: Prompt,
    ids: Tensor,
    key: _Key,
    say: Callable[[str], None],
) -> Iterator[Record]:
    """One context `[1, tokens]` under the first attention and every other one."""
    sides = [_first_tokens(loaded, words) for words in prompt.contrast]
    found: list[tuple[str, Tensor, str, dict[int, float]]] = []
    for name, config in configs.items():
        say(name)
        loaded.use(config)
        found.append((name, *_answer(loaded, ids, prompt, key.system)))
    (_, base, told, _), *others = found
    for name, own, answer, reads in others:
        odds = (_log_odds(base, sides), _log_odds(own, sides)) if all(sides) else None
        yield Record(
            prompt=key.prompt,
            label=prompt.label,
            place=key.place,
            length=key.length,
            attention=name,
            kl=float((base.exp() * (base - own)).sum()),
            flipped=bool(base.argmax() != own.argmax()),
            log_odds=odds,
            followed=(follows(prompt, told), follows(prompt, answer)) if prompt.expect else None,
            reads=reads,
        )


def _answer(
    loaded: LoadedModel, ids: Tensor, prompt: Prompt, system: int
) -> tuple[Tensor, str, dict[int, float]]:
    """Log-probabilities of the first token, `[words]` float32, a greedy answer if one is checked,
    and by layer the share of the `system` tokens at the beginning that its rows read."""
    cache = make_cache(loaded)
    watched = watch(cache, system, ids.shape[1] - 1)
    logits = last_logits(loaded, ids, cache)[0, -1]
    first, found = logits.float().log_softmax(-1), list[int]()
    ends = loaded.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    while prompt.expect and len(found) < ANSWER and (token := int(logits.argmax())) not in ends:
        found.append(token)
        logits = last_logits(loaded, ids.new_tensor([[token]]), cache)[0, -1]
    reads = {one.layer: one.share for one in watched}
    return first, loaded.tokenizer.decode(found, skip_special_tokens=True), reads


def follows(prompt: Prompt, answer: str) -> bool:
    """Whether an answer matches what its prompt expects."""
    return re.search(prompt.expect, answer) is not None


def _first_tokens(loaded: LoadedModel, words: Sequence[str]) -> list[int]:
    encoded = [loaded.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    return sorted({ids[0] for ids in encoded if ids})


def _log_odds(log_p: Tensor, sides: Sequence[list[int]]) -> float:
    """Log-odds of the first tokens against the second, under `[words]` log-probabilities."""
    one, other = (log_p[side].logsumexp(0) for side in sides)
    return float(one - other)


def _scope(loaded: LoadedModel) -> str:
    count = sum(weights.numel() for weights in loaded.model.parameters())
    if count >= LARGE:
        return (
            "first tokens, given contrasts and checked answers only: refusals and style are what "
            "your own prompts test"
        )
    return (
        f"a model of {count / 1e6:,.0f} million parameters refuses nothing: this shows divergence, "
        "instructions lost and what pinning mends, nothing about the safety of a large model"
    )
