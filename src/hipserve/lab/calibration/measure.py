"""Calibration on a model: measure, test, and write down what holds."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hipserve.attention.crossover import rule_for
from hipserve.config import DEFAULT, HiPConfig
from hipserve.errors import ArgumentError, FitError
from hipserve.lab.calibration.candidates import candidates, halves, keys_read, label
from hipserve.lab.calibration.certificate import Half, Pairs, Walk, walk
from hipserve.lab.intervals import mean
from hipserve.lab.provenance import provenance
from hipserve.lab.quality.controls import BLIND, blind
from hipserve.lab.quality.passes import check_span, encode_documents
from hipserve.lab.quality.perplexity import token_nll
from hipserve.lab.text import Document
from hipserve.models import LoadedModel

Say = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which configuration holds, and what was measured.

    Attributes:
        max_loss, confidence: what was asked for.
        choose, report: documents of either half, as `name sha256:digits`.
        keys: keys of a row by candidate, from the dearest to the cheapest; see `keys_read`.
        walk: losses and bounds.
        blind_loss: of sinks and window alone, on the report half.
        caught: that is more than `max_loss`, so these texts can show a loss.
        config: the configuration that holds, with its provenance; None where none does.
        best: name of that one, or of the one with the best estimate.
        seconds: median of a prefill of `length` tokens, of `dense` and of `best`, on this machine.
        dense_below, decode_dense_below: positions up to which this machine reads everything.
    """

    model: str
    length: int
    first: int
    max_loss: float
    confidence: float
    choose: list[str]
    report: list[str]
    too_short: list[str]
    keys: dict[str, float]
    walk: Walk
    blind_loss: float
    caught: bool
    config: HiPConfig | None
    best: str
    seconds: dict[str, float]
    dense_below: int
    decode_dense_below: int

    @property
    def certified(self) -> bool:
        return self.config is not None

    def to_dict(self) -> dict[str, Any]:
        config = self.config.to_dict() if self.config else None
        return {**asdict(self), "config": config, "certified": self.certified}


def calibrate(
    loaded: LoadedModel,
    documents: Sequence[Document],
    *,
    base: HiPConfig = DEFAULT,
    max_loss: float = 0.005,
    confidence: float = 0.9,
    length: int,
    first: int | None = None,
    progress: Say | None = None,
) -> Calibration:
    """The cheapest variant of `base` whose loss of likelihood is at most `max_loss`.

    The loss is that of the mean negative log-likelihood of the tokens at positions [first, length),
    relative to dense attention, with every row pruned that may be. It holds for documents like
    these at this length, with the stated confidence: under repeated sampling of documents, a
    certificate is wrong in at most 1 - `confidence` of all calibrations.

    Args:
        documents: those with fewer than `length` tokens are left out and listed.
        base: what is varied (`candidates`); its `dense_below` is what the result has.
        length: tokens of each document.
        first: position of the first token that counts; a quarter of `length` if None.
        progress: receives document and configuration before each pass.

    Raises:
        ArgumentError: `max_loss`, `confidence`, `length` or `first` out of range.
        FitError: `length` exceeds the context, fewer than two documents are long enough, or
            nothing would be pruned.
    """
    _check(max_loss, confidence)
    first = check_span(loaded, length, first)
    tried = candidates(loaded, base, length)
    if not tried:
        raise _nothing_to_prune(loaded, base, length)
    encoded = encode_documents(loaded, documents, length)
    if len(encoded) < 2:
        raise FitError(
            f"one document of {length:,} tokens or more: some are needed to choose by and some to "
            "report on",
            "give more documents, or a shorter length",
        )
    choose, report = halves(list(encoded))
    passes = _Passes(loaded, encoded, first, {"choose": choose, "report": report}, progress)
    blinded = blind(base)
    blind_loss = passes.measure(BLIND, blinded, "report").loss
    found = walk(
        list(tried),
        lambda name, half: passes.measure(name, tried[name], half),
        max_loss,
        confidence,
    )
    caught, holds = blind_loss > max_loss, found.certified
    best = (holds or found.tested[0]).name
    rule = _rule(loaded, base)
    made = Calibration(
        model=loaded.name,
        length=length,
        first=first,
        max_loss=max_loss,
        confidence=confidence,
        choose=[label(doc) for doc in choose],
        report=[label(doc) for doc in report],
        too_short=[doc.name for doc in documents if doc not in encoded],
        keys={name: keys_read(config, _layers(loaded), length) for name, config in tried.items()},
        walk=found,
        blind_loss=blind_loss,
        caught=caught,
        config=None,
        best=best,
        seconds={"dense": passes.seconds("dense"), "hip": passes.seconds(best)},
        dense_below=rule.dense_below,
        decode_dense_below=rule.decode_dense_below,
    )
    if not (holds and caught):
        return made
    kept = {"dense_below": base.dense_below, "decode_dense_below": base.decode_dense_below}
    table = _table(loaded, made)
    return replace(made, config=tried[best].replace(**kept, calibration=table))


def _check(max_loss: float, confidence: float) -> None:
    if not 0 < max_loss < 1:
        raise ArgumentError("max_loss", "a share between 0 and 1", str(max_loss), "write 0.5%")
    if not 0.5 <= confidence < 1:
        raise ArgumentError("confidence", "from 50% to below 100%", str(confidence), "write 90%")


def _nothing_to_prune(loaded: LoadedModel, base: HiPConfig, length: int) -> FitError:
    longer = (1 << n for n in range(length.bit_length(), loaded.max_context.bit_length()))
    enough = next((n for n in longer if candidates(loaded, base, n)), None)
    hint = f"try a length of {enough:,} tokens" if enough else "give a longer length"
    return FitError(f"nothing to prune in {length:,} tokens", hint)


class _Passes:
    """Nats of documents under configurations, each measured once, and how long that took."""

    def __init__(
        self,
        loaded: LoadedModel,
        encoded: dict[Document, torch.Tensor],
        first: int,
        halves: dict[Half, list[Document]],
        progress: Say | None,
    ) -> None:
        self._loaded, self._encoded, self._first = loaded, encoded, first
        self._halves, self._progress = halves, progress
        self._nats: dict[tuple[str, Document], float] = {}
        self._seconds: dict[str, list[float]] = {}

    def measure(self, name: str, config: HiPConfig, half: Half) -> Pairs:
        """Document by document, dense attention first where it has not read it yet."""
        documents = self._halves[half]
        pairs = [(self._read("dense", None, d), self._read(name, config, d)) for d in documents]
        return Pairs([dense for dense, _ in pairs], [pruned for _, pruned in pairs])

    def _read(self, name: str, config: HiPConfig | None, document: Document) -> float:
        if (name, document) not in self._nats:
            if self._progress:
                self._progress(document.name, name)
            self._loaded.use(config)
            began = time.perf_counter()
            nll = token_nll(self._loaded, self._encoded[document], self._first)
            self._seconds.setdefault(name, []).append(time.perf_counter() - began)
            self._nats[name, document] = float(nll.double().mean())
        return self._nats[name, document]

    def seconds(self, name: str) -> float:
        """The median pass."""
        times = sorted(self._seconds[name])
        return mean([times[(len(times) - 1) // 2], times[len(times) // 2]])


def _rule(loaded: LoadedModel, base: HiPConfig) -> Any:
    """From where on this machine prunes, as `base` leaves it open."""
    text = loaded.model.config.get_text_config()
    heads = text.num_attention_heads
    group = heads // (getattr(text, "num_key_value_heads", None) or heads)
    return rule_for(base, loaded.device, loaded.model.dtype, loaded.head_dim, group)


def _layers(loaded: LoadedModel) -> int:
    return int(loaded.model.config.get_text_config().num_hidden_layers)


def fingerprint(loaded: LoadedModel) -> str:
    """16 hexadecimal digits of SHA-256 over the model's settings and the first 64 numbers of every
    parameter: other weights or another architecture have another one."""
    config = {key: value for key, value in loaded.model.config.to_dict().items() if key != "hip"}
    seen = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weights in sorted(loaded.model.named_parameters()):
        seen.update(f"{name} {list(weights.shape)} {weights.dtype}".encode())
        seen.update(weights.detach().flatten()[:64].double().cpu().numpy().tobytes())
    return seen.hexdigest()[:16]


def _table(loaded: LoadedModel, made: Calibration) -> dict[str, Any]:
    """Provenance: what a configuration file says about its certificate."""
    holds = made.walk.certified
    assert holds is not None
    here = provenance("wall")
    gpu = loaded.device.type == "cuda"
    machine = torch.cuda.get_device_name(loaded.device) if gpu else f"{here.cpu} ({here.isa})"
    return {
        "statement": f"loss of likelihood at most {made.max_loss:.3%} with {made.confidence:.0%} "
        f"confidence, at {made.length} tokens, for documents like these",
        "max_loss": made.max_loss,
        "confidence": made.confidence,
        "loss": round(holds.loss, 6),
        "bound": round(holds.bound or 0.0, 6),
        "length": made.length,
        "first": made.first,
        "model": made.model,
        "model_fingerprint": fingerprint(loaded),
        "choose": made.choose,
        "report": made.report,
        "machine": machine,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "backend": loaded.backend,
        "torch": here.torch,
        "hipserve": here.hipserve,
        "commit": here.commit,
        "date": here.date,
    }
