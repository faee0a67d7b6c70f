"""What calibration tries, in an order that no text decides, and how texts are divided."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hipserve.config import HiPConfig
from hipserve.lab.quality.passes import may_prune
from hipserve.lab.text import Document
from hipserve.models import LoadedModel

BUDGETS = (128, 256, 512, 1024, 2048, 4096)
RERANKS = (4, 8)
DENSE_FIRST = (512, 1024, 2048)
"""Budgets that are tried with a dense first layer as well: its mass often lies everywhere."""


def candidates(loaded: LoadedModel, base: HiPConfig, length: int) -> dict[str, HiPConfig]:
    """Variants of `base` by name, from the dearest to the cheapest.

    Those are left out that prune nothing in `length` tokens, and those that read as much as dense
    attention.
    """
    base = base.replace(dense_below=0, decode_dense_below=0)
    reranks = RERANKS if base.selector == "bound" and base.rerank else (base.rerank,)
    grid = [(budget, rerank, False) for budget in BUDGETS for rerank in reranks]
    grid += [(budget, reranks[0], True) for budget in DENSE_FIRST if 0 not in base.dense_layers]
    found: dict[str, HiPConfig] = {}
    for budget, rerank, first in grid:
        if budget % base.granularity == 0:
            layers = (0, *base.dense_layers) if first else base.dense_layers
            config = base.replace(budget=budget, rerank=rerank, dense_layers=layers)
            found[_name(config)] = config
    layers = loaded.model.config.get_text_config().num_hidden_layers
    kept = {name: config for name, config in found.items() if may_prune(loaded, config, length)}
    order = sorted(kept, key=lambda name: keys_read(kept[name], layers, length), reverse=True)
    return {name: kept[name] for name in order if keys_read(kept[name], layers, length) < length}


def keys_read(config: HiPConfig, layers: int, length: int) -> float:
    """Keys of a row at the end of `length` tokens, mean over layers.

    Keys that are re-ranked count half: their values are not read. Summaries cost all candidates the
    same and are left out.
    """
    dense = sum(layer < layers for layer in config.dense_layers) / layers
    pruned = config.num_sink_tokens + config.sliding_window + config.budget
    if config.selector == "bound":
        pruned += config.rerank * config.budget / 2
    return dense * length + (1 - dense) * min(pruned, length)


def _name(config: HiPConfig) -> str:
    parts = [f"budget {config.budget}"]
    parts += [f"rerank {config.rerank}"] if config.selector == "bound" else []
    if config.dense_layers:
        parts.append(f"dense layers {','.join(map(str, config.dense_layers))}")
    return ", ".join(parts)


def halves(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Documents to choose by and documents to report on, whatever order they come in.

    In the order of domains, and in a domain of the digests of their texts, every other one is for
    the report, the first included.
    """
    order = sorted(documents, key=lambda doc: (doc.domain, digest(doc.text)))
    return order[1::2], order[::2]


def digest(text: str) -> str:
    """16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def label(document: Document) -> str:
    """Its name with its digest, as names repeat and files change."""
    return f"{document.name} sha256:{digest(document.text)}"
