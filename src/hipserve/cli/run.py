"""`hipserve run`: one question, about a document if there is one."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hipserve.cli import offloading, options
from hipserve.cli.document import OpenDocument, as_text
from hipserve.cli.numbers import format_bytes
from hipserve.cli.output import progress_bar, result, result_json, say
from hipserve.errors import ArgumentError

if TYPE_CHECKING:
    from hipserve.models import Conversation


def run(
    words: Annotated[list[str], typer.Argument(metavar="[MODEL] QUESTION")],
    doc: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What it is about: a text file (or gzip), - for stdin."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    system: options.System = "",
    pin_system: options.PinSystem = False,
    budget: options.Budget = None,
    selector: options.Selector = None,
    code_bits: options.CodeBits = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    extend: options.Extend = None,
    extend_factor: options.ExtendFactor = None,
    meter: options.Meter = False,
    dense: Annotated[bool, typer.Option("--dense", help="Dense attention instead of HiP.")] = False,
    kv_offload: offloading.KvOffload = False,
    kv_file: offloading.KvFile = None,
    host_kv_memory: offloading.HostKvMemory = None,
    kv_device_memory: offloading.KvDeviceMemory = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    allow_control_tokens: options.ControlTokens = False,
    json: options.Json = False,
) -> None:
    """Answers a question, about a document of any length that fits the model if one is given."""
    model, question = split_words(words)
    options.check_system(system, pin_system)
    if dense:
        options.refuse_with_dense(
            config, preset, budget, selector, code_bits, meter=meter, extend=extend
        )
    sizes = (kv_file, host_kv_memory, kv_device_memory)
    offloaded = offloading.is_asked_for(kv_offload, *sizes, device=device, dense=dense)
    document = None if doc is None else OpenDocument(doc)
    settings = options.make_config(
        config,
        preset,
        budget,
        selector,
        code_bits,
        extend=extend,
        extend_factor=extend_factor,
        meter=meter,
    )
    if offloaded:
        settings = offloading.offloaded(settings, code_bits, config, preset)
    loaded = options.load_model(model, settings, device, dtype)
    if dense:
        loaded.use(None)
    from hipserve.models import Conversation

    loaded = replace(loaded, control_tokens=allow_control_tokens)
    talk = Conversation(
        loaded,
        system=as_text("system", system),
        pin_system=pin_system,
        offload=offloading.make_offload(loaded, *sizes) if offloaded else None,
    )
    if document is not None:
        talk.say(f"Read the text.\n\n{document.read_for(loaded)}")
    answer = ask(
        talk,
        question,
        stream=not json,
        max_new_tokens=max_new_tokens,
        **options.sampling(temperature, seed),
    )
    statistics = talk.statistics
    assert statistics is not None
    if json:
        speed = {"decode_tokens_per_second": statistics.decode_tokens_per_second}
        names = {"model": loaded.name, "backend": loaded.backend}
        result_json({"answer": answer, **names, **asdict(statistics), **speed})
    else:
        report(talk)


def split_words(words: list[str]) -> tuple[str | None, str]:
    """Model and question of `[MODEL] QUESTION`.

    Raises:
        typer.BadParameter: there are more words.
        ArgumentError: there is no such model, or no question.
    """
    if len(words) > 2:
        raise typer.BadParameter("expected [MODEL] QUESTION; put the question in quotes")
    if not words[-1].strip():
        raise ArgumentError("question", "some words", repr(words[-1]))
    model = words[0] if len(words) == 2 else None
    options.check_model(model)
    return model, as_text("question", words[-1])


def ask(talk: Conversation, question: str, *, stream: bool = True, **generation: Any) -> str:
    """Asks with a progress bar on stderr and, streaming, the answer on stdout."""
    with progress_bar() as bar:
        task = bar.add_task("reading", total=0, visible=False)
        ends: list[str] = []

        def on_prefill(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=total > 256)

        def on_text(text: str) -> None:
            if bar.live.is_started:
                bar.stop()
            result(text, end="")
            ends.append(text[-1])

        answer = talk.ask(
            question, on_prefill=on_prefill, on_text=on_text if stream else None, **generation
        )
    if stream and ends[-1:] != ["\n"]:
        result("")
    if not answer.strip():
        say("the answer is empty: the model ended its turn at once", style="yellow")
    return answer


def describe_unread(shares: dict[int, float]) -> str:
    """The meter's estimates by layer, for the line below an answer; nothing without any."""
    if not shares:
        return ""
    worst = max(shares, key=lambda layer: shares[layer])
    average = sum(shares.values()) / len(shares)
    return f"attention unread: about {average:.1%}, {shares[worst]:.1%} in layer {worst}; "


def report(talk: Conversation) -> None:
    """What the last answer cost, on stderr."""
    statistics = talk.statistics
    assert statistics is not None
    unread = describe_unread(statistics.unread)
    cache = format_bytes(statistics.cache_bytes)
    if statistics.offloaded_bytes:
        cache += f", {format_bytes(statistics.offloaded_bytes)} of it offloaded"
    if statistics.tiles_needed:
        cache += f", {statistics.tiles_found:.1%} of the tiles on the GPU when they were needed"
    say(
        f"{statistics.prompt_tokens:,} tokens in ({statistics.cached_tokens:,} already read), "
        f"first token after {statistics.first_token_seconds:.2f} s, "
        f"then {statistics.decode_tokens_per_second:.1f} tokens/s; keys read: "
        f"{statistics.prefill_share:.1%} in prefill, {statistics.decode_share:.1%} in decode; "
        f"{unread}cache {cache}; attention: {talk.loaded.backend}"
    )
