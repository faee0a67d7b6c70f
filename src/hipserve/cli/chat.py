"""`hipserve chat`: a conversation, about a document if one is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import typer

from hipserve.cli import offloading, options
from hipserve.cli.document import OpenDocument, as_text, standard_input
from hipserve.cli.output import err, say
from hipserve.cli.run import ask, report
from hipserve.errors import ArgumentError, FitError


def chat(
    model: options.Model = None,
    doc: Annotated[
        str | None, typer.Option(metavar="FILE", help="A text file to talk about.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 256,
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
    kv_offload: offloading.KvOffload = False,
    kv_file: offloading.KvFile = None,
    host_kv_memory: offloading.HostKvMemory = None,
    kv_device_memory: offloading.KvDeviceMemory = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    allow_control_tokens: options.ControlTokens = False,
) -> None:
    """Talks with a model; what was read stays in its cache. An empty line or Ctrl-D ends it."""
    standard_input()
    options.check_system(system, pin_system)
    sizes = (kv_file, host_kv_memory, kv_device_memory)
    offloaded = offloading.is_asked_for(kv_offload, *sizes, device=device)
    document = OpenDocument(doc) if doc is not None else None
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
        loaded.check_fit(loaded.encode(talk.turns).shape[1], max_new_tokens)
    generation = options.sampling(temperature, seed)
    for question in _questions():
        try:
            ask(talk, question, max_new_tokens=max_new_tokens, **generation)
        except FitError as error:
            if not talk.statistics:
                raise
            say(str(error), style="red")
            break
        report(talk)


def _questions() -> Iterator[str]:
    """Lines that are typed, up to an empty one; what is no text is refused and asked for again."""
    while line := _read_line():
        try:
            yield as_text("question", line)
        except ArgumentError as error:
            say(f"error: {error.message}", style="red")
            say("hint: type the question again, in UTF-8", style="cyan")


def _read_line() -> str:
    err.print("> ", end="", style="bold")
    return standard_input().readline().strip()
