"""`hipserve demo`: the bundled model reads a long text with planted facts and answers."""

from __future__ import annotations

import re
import resource
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hipserve.cli import options
from hipserve.cli.document import OpenDocument
from hipserve.cli.numbers import format_bytes, parse_count
from hipserve.cli.output import result, result_json, say
from hipserve.cli.run import ask
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.lab.quality.tasks import (
    MAGIC_QUESTION,
    MEMORIZE,
    PASS_KEY_QUESTION,
    magic_number,
    pass_key,
    plant,
)

if TYPE_CHECKING:
    from hipserve.models import LoadedModel, Statistics


@dataclass(frozen=True, slots=True)
class Fact:
    """A sentence to plant at a depth (0 to 1), its question, and what the answer must hold."""

    depth: float
    sentence: str
    question: str
    value: str

    def is_in(self, answer: str) -> bool:
        """The answer has the value as a whole number: one that goes on is another number."""
        return self.value in re.findall(r"\d+", answer)


def _magic(depth: float, key: str, value: str) -> Fact:
    return Fact(
        depth,
        magic_number(key, value),
        MAGIC_QUESTION.format(key),
        value,
    )


FACTS = (
    _magic(0.07, "walnut", "4821937"),
    _magic(0.33, "lantern", "7350264"),
    Fact(
        0.58,
        pass_key("60718"),
        PASS_KEY_QUESTION,
        "60718",
    ),
    _magic(0.86, "harbor", "1946508"),
)
ROOM = 1024
"""Tokens kept for facts, questions and answers."""


def demo(
    doc: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A text file; the Python language reference otherwise."),
    ] = None,
    length: Annotated[
        int,
        typer.Option(parser=parse_count, show_default="66k", help="Maximum tokens to read."),
    ] = 66 * 1024,
    dense_length: Annotated[
        int,
        typer.Option(
            parser=parse_count, show_default="16k", help="Tokens to read densely as well."
        ),
    ] = 16 * 1024,
    budget: options.Budget = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Plants facts in a long text, asks for them, and compares with dense attention."""
    from hipserve.lab.text import language_reference

    _check_length("length", length)
    _check_length("dense_length", dense_length)
    document = OpenDocument(doc) if doc is not None else None
    config = options.make_config(budget=budget)
    loaded = options.load_model(None, config, device, "auto")
    text = language_reference() if document is None else _beginning(document, loaded)
    say(f"{loaded.name}, budget {config.budget} keys, attention: {loaded.backend}, {_machine()}")
    reading = _read(loaded, config, text, min(length, loaded.max_context), FACTS, stream=not json)
    measured = _measured(reading)
    if not json:
        result(_summary(reading, measured))
    shorter = min(dense_length, loaded.max_context)
    about = min(shorter, reading.statistics[0].prompt_tokens)
    say(f"one question about some {about:,} tokens, HiP and then dense (torch SDPA)")
    comparison = _compare(loaded, config, text, shorter)
    if json:
        machine = {"model": loaded.name, "backend": loaded.backend, "machine": _machine()}
        result_json({**machine, "config": config.to_dict(), **measured, "comparison": comparison})
    else:
        result(_ratios(comparison))
    if reading.right < len(FACTS):
        raise typer.Exit(1)


def _beginning(document: OpenDocument, loaded: LoadedModel) -> str:
    """As much of a document as fits the model's context."""
    from hipserve.lab.text import decode_text

    content = document.read(loaded.max_bytes)
    cut = len(content) == loaded.max_bytes
    if cut:
        say(f"looking at the first {loaded.max_bytes:,} bytes of {document.source}")
    return decode_text(content, document.source, cut=cut)


def _check_length(argument: str, value: int) -> None:
    if value < 2 * ROOM:
        raise ArgumentError(argument, f"{2 * ROOM} tokens or more", str(value))


@dataclass(frozen=True, slots=True)
class Reading:
    """Answers about one document, in the order of its facts, and what each cost."""

    answers: list[dict[str, Any]]
    statistics: list[Statistics]

    @property
    def right(self) -> int:
        return sum(answer["right"] for answer in self.answers)


def _read(
    loaded: LoadedModel,
    config: HiPConfig | None,
    text: str,
    length: int,
    facts: tuple[Fact, ...],
    *,
    stream: bool,
) -> Reading:
    """Plants the facts, reads, and asks for one after the other."""
    from hipserve.models import Conversation

    clipped = _first_tokens(loaded, text, length - ROOM)
    document = plant(clipped, [f.sentence for f in facts], [f.depth for f in facts])
    loaded.use(config)
    talk, reading = Conversation(loaded), Reading([], [])
    talk.say(f"{MEMORIZE}\n\n{document}")
    for fact in facts:
        say(f"planted at {fact.depth:.0%}: {fact.question}")
        answer = ask(talk, fact.question, stream=stream, max_new_tokens=40)
        right = fact.is_in(answer)
        reading.answers.append({**asdict(fact), "answer": answer, "right": right})
        assert talk.statistics is not None
        reading.statistics.append(talk.statistics)
    return reading


def _first_tokens(loaded: LoadedModel, text: str, count: int) -> str:
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > count:
        say(f"reading the first {count:,} of the text's {len(ids):,} tokens")
    return loaded.tokenizer.decode(ids[:count])


def _measured(reading: Reading) -> dict[str, Any]:
    first = reading.statistics[0]
    steps = sum(s.new_tokens - 1 for s in reading.statistics)
    seconds = sum(s.decode_seconds for s in reading.statistics)
    return {
        "prompt_tokens": first.prompt_tokens,
        "answers": reading.answers,
        "first_token_seconds": first.first_token_seconds,
        "decode_tokens_per_second": steps / seconds if seconds else 0.0,
        "prefill_share": first.prefill_share,
        "decode_share": first.decode_share,
        "cache_bytes": first.cache_bytes,
        "peak_bytes": _peak_bytes(),
    }


def _summary(reading: Reading, measured: dict[str, Any]) -> str:
    return (
        f"\n{measured['prompt_tokens']:,} tokens read; "
        f"{reading.right} of {len(reading.answers)} answers right"
        f"\ntime to first token   {measured['first_token_seconds']:8.2f} s"
        f"\ndecode                {measured['decode_tokens_per_second']:8.1f} tokens/s"
        f"\nkeys read             {measured['prefill_share']:8.1%} in prefill, "
        f"{measured['decode_share']:.1%} in decode"
        f"\ncache                 {format_bytes(measured['cache_bytes']):>8}"
        f"\npeak memory           {format_bytes(measured['peak_bytes']):>8}\n"
    )


def _compare(loaded: LoadedModel, config: HiPConfig, text: str, length: int) -> dict[str, Any]:
    """The same short run pruned and dense, alternately: both times, and dense over HiP."""
    runs: dict[str, dict[str, Any]] = {}
    for name, chosen in (("hip", config), ("dense", None)):
        reading = _read(loaded, chosen, text, length, FACTS[1:2], stream=False)
        runs[name] = _measured(reading)
        say(f"{name}: {reading.answers[0]['answer']}")
    loaded.use(config)
    hip, dense = runs["hip"], runs["dense"]
    first = dense["first_token_seconds"] / hip["first_token_seconds"]
    decode = hip["decode_tokens_per_second"] / max(dense["decode_tokens_per_second"], 1e-9)
    return {**runs, "first_token_ratio": first, "decode_ratio": decode}


def _ratios(comparison: dict[str, Any]) -> str:
    hip, dense = comparison["hip"], comparison["dense"]
    at = f"at {hip['prompt_tokens']:,} tokens"
    return (
        f"\n{at:20} {'HiP':>10} {'dense':>10} {'ratio':>8}"
        f"\n{'time to first token':20} {hip['first_token_seconds']:8.2f} s"
        f" {dense['first_token_seconds']:8.2f} s {comparison['first_token_ratio']:7.1f}x"
        f"\n{'decode, tokens/s':20} {hip['decode_tokens_per_second']:10.1f}"
        f" {dense['decode_tokens_per_second']:10.1f} {comparison['decode_ratio']:7.1f}x"
    )


def _machine() -> str:
    from hipserve.platform import cpu_name, gpu_name

    return gpu_name() or cpu_name()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
