"""`hipserve demo`: the bundled model reads a long text with planted facts and answers."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from hipserve.cli import options
from hipserve.cli.numbers import format_bytes, parse_count
from hipserve.cli.output import err, result
from hipserve.cli.run import ask, read_document
from hipserve.config import HiPConfig

if TYPE_CHECKING:
    from hipserve.models import LoadedModel, Statistics


@dataclass(frozen=True, slots=True)
class Fact:
    """A sentence to plant at a depth (0 to 1), its question, and what the answer must hold."""

    depth: float
    sentence: str
    question: str
    value: str


def _magic(depth: float, key: str, value: str) -> Fact:
    return Fact(
        depth,
        f"One of the special magic numbers for {key} is: {value}.",
        f"What is the special magic number for {key} mentioned in the provided text?",
        value,
    )


FACTS = (
    _magic(0.07, "walnut", "4821937"),
    _magic(0.33, "lantern", "7350264"),
    Fact(
        0.58,
        "The pass key is 60718. Remember it. 60718 is the pass key.",
        "What is the pass key?",
        "60718",
    ),
    _magic(0.86, "harbor", "1946508"),
)
OPENING = "Some special values are hidden in the following text. Memorize them."
ROOM = 1024
"""Tokens kept for facts, questions and answers."""


def demo(
    doc: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A text file; the Python language reference otherwise."),
    ] = None,
    length: Annotated[
        int,
        typer.Option(parser=parse_count, show_default="66k", help="Most tokens to read."),
    ] = 66 * 1024,
    dense_length: Annotated[
        int,
        typer.Option(parser=parse_count, show_default="16k", help="Tokens read densely, too."),
    ] = 16 * 1024,
    budget: options.Budget = None,
    device: options.Device = None,
) -> None:
    """Plants facts in a long text, asks for them, and compares with dense attention."""
    from hipserve.evaluate.text import language_reference

    text = read_document(doc) if doc else language_reference()
    config = options.make_config(budget=budget)
    loaded = options.load_model(None, config, device, "auto")
    _say(f"{loaded.name} with HiP attention, budget {config.budget} keys, on {_machine()}")
    statistics, right = _read_and_ask(loaded, config, text, min(length, loaded.max_context), FACTS)
    first = statistics[0]
    speed = sum(s.decode_tokens_per_second for s in statistics) / len(statistics)
    result(
        f"\n{first.prompt_tokens:,} tokens read; {right} of {len(FACTS)} answers right"
        f"\ntime to first token   {first.first_token_seconds:8.2f} s"
        f"\ndecode                {speed:8.1f} tokens/s"
        f"\nkeys read             {first.prefill_share:8.1%} in prefill, "
        f"{first.decode_share:.1%} in decode"
        f"\ncache                 {format_bytes(first.cache_bytes):>8}"
        f"\npeak memory           {format_bytes(_peak_bytes()):>8}\n"
    )
    _compare(loaded, config, text, min(dense_length, first.prompt_tokens))
    if right < len(FACTS):
        raise typer.Exit(1)


def _read_and_ask(
    loaded: LoadedModel, config: HiPConfig | None, text: str, length: int, facts: tuple[Fact, ...]
) -> tuple[list[Statistics], int]:
    """Statistics of each answer, and how many were right."""
    from hipserve.evaluate.tasks import plant
    from hipserve.models import Conversation

    clipped = _first_tokens(loaded, text, length - ROOM)
    document = plant(clipped, [f.sentence for f in facts], [f.depth for f in facts])
    loaded.use(config)
    talk, statistics, right = Conversation(loaded), [], 0
    talk.say(f"{OPENING}\n\n{document}")
    for fact in facts:
        _say(f"planted at {fact.depth:.0%}: {fact.question}")
        answer = ask(talk, fact.question, max_new_tokens=40)
        right += fact.value in answer
        assert talk.statistics is not None
        statistics.append(talk.statistics)
    return statistics, right


def _first_tokens(loaded: LoadedModel, text: str, count: int) -> str:
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > count:
        _say(f"reading the first {count:,} of the text's {len(ids):,} tokens")
    return loaded.tokenizer.decode(ids[:count])


def _compare(loaded: LoadedModel, config: HiPConfig, text: str, length: int) -> None:
    """The same short run pruned and dense, in turn."""
    _say(f"the same with {length:,} tokens, HiP and then dense (torch SDPA)")
    runs: dict[str, Statistics] = {}
    for name, chosen in (("HiP", config), ("dense", None)):
        began = time.perf_counter()
        runs[name] = _read_and_ask(loaded, chosen, text, length, FACTS[1:2])[0][0]
        _say(f"{name}: {time.perf_counter() - began:.1f} s")
    hip, dense = runs["HiP"], runs["dense"]
    seconds = (hip.first_token_seconds, dense.first_token_seconds)
    speed = (hip.decode_tokens_per_second, dense.decode_tokens_per_second)
    result(
        f"\n{f'at {hip.prompt_tokens:,} tokens':20} {'HiP':>10} {'dense':>10} {'ratio':>8}"
        f"\n{'time to first token':20} {seconds[0]:8.2f} s {seconds[1]:8.2f} s"
        f" {seconds[1] / seconds[0]:7.1f}x"
        f"\n{'decode, tokens/s':20} {speed[0]:10.1f} {speed[1]:10.1f} {speed[0] / speed[1]:7.1f}x"
    )


def _machine() -> str:
    from hipserve.platform import cpu_name, gpu_name

    return gpu_name() or cpu_name()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _say(text: str) -> None:
    err.print(text, style="dim", markup=False, highlight=False)
