"""`hipserve chat`: a conversation, about a document if one is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from hipserve.cli import offloading, options
from hipserve.cli.output import err, say
from hipserve.cli.run import (
    as_text,
    ask,
    open_document,
    read_document,
    report,
    standard_input,
)
from hipserve.errors import FitError


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
    sizes = (kv_file, host_kv_memory, kv_device_memory)
    offloaded = offloading.is_asked_for(kv_offload, *sizes, device=device)
    stream = open_document(doc) if doc is not None else None
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
    if doc is not None and stream is not None:
        talk.say(f"Read the text.\n\n{read_document(stream, doc, loaded)}")
        loaded.check_fit(loaded.encode(talk.turns).shape[1], max_new_tokens)
    generation = options.sampling(temperature, seed)
    while question := _read_line():
        try:
            ask(talk, question, max_new_tokens=max_new_tokens, **generation)
        except FitError as error:
            if not talk.statistics:
                raise
            say(str(error), style="red")
            break
        report(talk)


def _read_line() -> str:
    err.print("> ", end="", style="bold")
    return as_text("question", standard_input().readline().strip())
