"""Stretches of equal length, cut from texts or from what every machine has of each domain."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.errors import FitError
from hipserve.lab import installed
from hipserve.lab.quality.passes import check_length, numbers_to_try
from hipserve.lab.text import Document, language_reference
from hipserve.models import LoadedModel

CITIES = ("Lima", "Osaka", "Tunis", "Bergen", "Quito", "Perth", "Dakar", "Turin", "Hanoi", "Leeds")
STATES = ("open", "closed", "waiting", "failed")
PIECE = 1_000
"""Characters of each text that a mixture takes at a time."""
CHARACTERS = 8
"""Characters of a token, at most: longer texts than needed are cut."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One stretch of tokens.

    Attributes:
        name, domain: of the text it was cut from.
        ids: `[1, length]` int64, on the model's device.
    """

    name: str
    domain: str
    ids: Tensor


def cut_samples(
    loaded: LoadedModel, documents: Sequence[Document], length: int, samples: int
) -> list[Sample]:
    """Up to `samples` stretches of `length` tokens from each document, spread over all of it.

    Raises:
        FitError: `length` exceeds the context, or no document has so many tokens.
    """
    check_length(loaded, length)
    cut = [part for doc in documents for part in _cut(loaded, doc, length, samples)]
    if not cut:
        raise FitError(
            f"nothing to measure: no text has {length:,} tokens",
            "lower the length or give longer texts",
        )
    return cut


def check_room(length: int, config: HiPConfig, largest: int) -> int:
    """The end of the keys that every row of the last quarter of `length` tokens may search.

    Raises:
        FitError: they hold no block of `largest` keys, or not more than the budget.
    """

    def searched(config: HiPConfig, length: int) -> int:
        return length * 3 // 4 - config.sliding_window - config.num_sink_tokens

    def has_room(config: HiPConfig, length: int) -> bool:
        return searched(config, length) >= max(largest, config.budget + config.granularity)

    if not has_room(config, length):
        raise FitError(
            f"{length:,} tokens leave no range of {largest} keys, or nothing to prune, between "
            f"the {config.num_sink_tokens} sinks and a window of {config.sliding_window}",
            numbers_to_try(config, length, has_room),
        )
    return searched(config, length) + config.num_sink_tokens


def _cut(loaded: LoadedModel, doc: Document, length: int, samples: int) -> Iterator[Sample]:
    text = doc.text[: samples * length * CHARACTERS]
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    count = min(samples, ids.shape[1] // length)
    for i in range(count):
        start = (ids.shape[1] - length) * i // max(count - 1, 1)
        part = ids[:, start : start + length].to(loaded.device)
        yield Sample(f"{doc.name} {i}" if count > 1 else doc.name, doc.domain, part)


def domain_documents(size: int, seed: int = 0) -> list[Document]:
    """One text of `size` characters or more (where there are as many) of each domain.

    Code is Python's own library, documentation its language reference; licences are those of
    installed packages; tables of random records and lists of random identifiers are generated.
    What is installed differs between machines.
    """
    texts = {
        "code": _joined(installed.sources(), size),
        "documentation": language_reference(),
        "licences": _joined(installed.licenses(), size),
        "tables": _generated(_record, size, seed),
        "identifiers": _generated(_identifier, size, seed),
    }
    return [Document(name, name, text) for name, text in texts.items() if text]


def locality_documents(size: int, seed: int = 0) -> list[Document]:
    """Those of `domain_documents`, and prose, mathematics, and a mixture of all these in pieces.

    Prose are docstrings of Python's own library without their code, mathematics docstrings with
    formulas of SymPy.
    """
    others = {
        "prose": _joined(installed.prose(), size),
        "mathematics": _joined(installed.mathematics(), size),
    }
    documents = domain_documents(size, seed)
    documents += [Document(name, name, text) for name, text in others.items() if text]
    pieces = (
        doc.text[start : start + PIECE] + "\n\n"
        for start in range(0, size, PIECE)
        for doc in documents
    )
    return [*documents, Document("mixture", "mixture", _joined(pieces, size))]


def _joined(parts: Iterator[str], size: int) -> str:
    joined = ""
    for part in parts:
        joined += part
        if len(joined) >= size:
            break
    return joined


def _generated(line: Callable[[random.Random], str], size: int, seed: int) -> str:
    numbers, lines, length = random.Random(seed), list[str](), 0
    while length < size:
        lines.append(line(numbers))
        length += len(lines[-1]) + 1
    return "\n".join(lines)


def _record(numbers: random.Random) -> str:
    """A row of a table: a date, a place, two numbers, a state."""
    day = f"2026-{numbers.randint(1, 12):02}-{numbers.randint(1, 28):02}"
    sizes = f"{numbers.uniform(0, 100):.2f} | {numbers.randint(0, 9999)}"
    return f"| {day} | {numbers.choice(CITIES)} | {sizes} | {numbers.choice(STATES)} |"


def _identifier(numbers: random.Random) -> str:
    return str(uuid.UUID(int=numbers.getrandbits(128), version=4))
