"""How much less likely does pruned attention find real text? Part of what `fidelity` measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.lab.quality.beside import read_reference
from hipserve.lab.quality.fidelity import FidelityReport, evaluate_fidelity
from hipserve.lab.text import Document
from hipserve.models import LoadedModel

PerplexityReport = FidelityReport


def evaluate_perplexity(
    loaded: LoadedModel,
    configs: dict[str, HiPConfig | None],
    documents: Sequence[Document],
    *,
    length: int,
    first: int | None = None,
    progress: Callable[[str, str], None] | None = None,
) -> PerplexityReport:
    """`evaluate_fidelity` without controls and verdicts."""
    return evaluate_fidelity(
        loaded,
        configs,
        documents,
        length=length,
        first=first,
        margins={},
        controls=False,
        far=False,
        progress=progress,
    )


def token_nll(loaded: LoadedModel, ids: Tensor, first: int = 1) -> Tensor:
    """`[tokens - first]` float32 nats: of each token of `ids` `[1, tokens]` from `first` on."""
    return read_reference(loaded, ids, first).nll
