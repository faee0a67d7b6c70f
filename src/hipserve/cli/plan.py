"""`hipserve plan`: what a model takes on a card, what fits, and the flags for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hipserve.capacity.advice import Machine, Plan, readable
from hipserve.capacity.cards import CARDS, CHUNK, chunk_of_card, find_card, recognise
from hipserve.capacity.memory import Service
from hipserve.capacity.shape import ModelShape
from hipserve.cli import options
from hipserve.cli.numbers import at_least, parse_size
from hipserve.cli.offloading import offloaded
from hipserve.cli.output import result, result_json
from hipserve.cli.plan_text import as_table, describe_model, lines, served_name
from hipserve.errors import ArgumentError, did_you_mean
from hipserve.host import HostMemory, installed_gpu
from hipserve.integrations.vllm.limits import FP8_CACHES
from hipserve.models.bundled import BUNDLED
from hipserve.models.config_file import read_config

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Directory, config.json or hub name; the bundled model if left out.",
    ),
]

Sequences = Annotated[
    int,
    typer.Option(parser=at_least(1), metavar="NUMBER", help="Sequences of that context at once."),
]
Cards = Annotated[
    int,
    typer.Option(parser=at_least(1), metavar="NUMBER", help="Such cards that share the model."),
]


def plan(
    planned: Model = None,  # not `model`, which `CHECKS` wants to be a checkpoint
    max_model_len: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1),
            metavar="TOKENS",
            help="Context, such as 1M; all positions of the model if left out.",
        ),
    ] = None,
    max_num_seqs: Sequences = 1,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1), metavar="TOKENS", help="Tokens of a step; vLLM's default."
        ),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help=f"{', '.join(CARDS)}; this machine's if left out.")
    ] = None,
    device_memory: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="Memory of the card, such as 24G."),
    ] = None,
    tensor_parallel_size: Cards = 1,
    kv_offload: Annotated[
        bool,
        typer.Option(
            "--kv-offload", help="Keys and values in host memory, or in a file of a CPU machine."
        ),
    ] = False,
    host_kv_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Room for them, such as 64GiB; half of what is available, or any file.",
        ),
    ] = None,
    budget: options.Budget = None,
    selector: options.Selector = None,
    code_bits: options.CodeBits = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    dtype: options.DType = "auto",
    kv_cache_dtype: options.KvCacheDtype = "auto",
    json: options.Json = False,
) -> None:
    """Says what a model takes on a card, from its config.json alone; exit code 1 if it does not
    fit. Nothing is loaded or downloaded."""
    name = planned or BUNDLED
    if host_kv_memory is not None and not kv_offload:
        raise ArgumentError("--host-kv-memory", "--kv-offload with it", "no --kv-offload")
    whole, cards = ModelShape.of(read_config(name), dtype), tensor_parallel_size
    machine = find_machine(gpu, device_memory)
    check_cards(cards, machine)
    whole = with_cache(whole, kv_cache_dtype, machine, kv_offload)
    settings = options.make_config(config, preset, budget, selector, code_bits)
    if kv_offload:
        settings = offloaded(settings, code_bits, config, preset if machine.on_gpu else None)
    service = Service(
        model=whole.part(cards),
        config=settings,
        context=max_model_len or whole.positions or 32_768,
        sequences=max_num_seqs,
        chunk=max_num_batched_tokens or default_chunk(machine),
        offload=kv_offload,
        on_gpu=machine.on_gpu,
        cards=cards,
    )
    made = Plan(service, machine, machine.room(host_kv_memory))
    given = _settings_flags(config, preset, budget, selector, code_bits, dtype)
    command = _command(made, name, [*_flags(made, max_num_batched_tokens), *given])
    if json:
        result_json(as_table(made, command))
    else:
        result("\n".join(lines(made, describe_model(name, whole), command)))
    if not made.fits:
        raise typer.Exit(1)


def check_cards(cards: int, machine: Machine) -> None:
    """Refuses several cards where there are none."""
    if cards > 1 and not machine.on_gpu:
        raise ArgumentError("--tensor-parallel-size", "a GPU with it", machine.title)


def with_cache(shape: ModelShape, cache: str, machine: Machine, kv_offload: bool) -> ModelShape:
    """The model with keys and values of the type `cache`.

    Raises:
        ArgumentError: HiP attention does not read such ones there.
    """
    known = ("auto", shape.dtype, *FP8_CACHES)
    if cache not in known:
        expected = f"one of {', '.join(known)}"
        raise ArgumentError("--kv-cache-dtype", expected, cache, did_you_mean(cache, known))
    if cache in FP8_CACHES and not machine.on_gpu:
        hint = "leave it out, or name a card: --gpu h100-80g"
        raise ArgumentError("--kv-cache-dtype", "auto on a CPU machine", cache, hint)
    if kv_offload and cache in FP8_CACHES:
        raise ArgumentError("--kv-offload", "keys and values as the model computes them", cache)
    return replace(shape, cache_dtype=cache)


def find_machine(gpu: str | None, device_memory: int | None) -> Machine:
    """The card that was named, one of so much memory, or what this machine has."""
    host = HostMemory.read()
    if gpu is not None:
        card = find_card(gpu)
        return Machine(card.title, device_memory or int(card.memory), card=card, host=host)
    if device_memory is not None:
        return Machine(f"a card of {readable(device_memory)}", device_memory, host=host)
    installed = installed_gpu()
    if installed is not None:
        card = recognise(installed.name, installed.memory)
        return Machine(installed.name, installed.memory, card=card, host=host)
    if host is None:
        hint = "name a card: --gpu h100-80g"
        raise ArgumentError("gpu", "a card", "none, and no /proc/meminfo", hint)
    return Machine("this CPU machine", host.available, share=1, on_gpu=False, host=host)


def default_chunk(machine: Machine) -> int:
    """What vLLM's server reads in a step unless told otherwise."""
    return chunk_of_card(machine.title, machine.memory) if machine.on_gpu else CHUNK


def _command(made: Plan, name: str, flags: list[str]) -> list[str]:
    """The command that serves it; nothing where `serve` refuses to."""
    shape = made.service.model
    windowed = shape.full_layers < len(shape.windows)
    if made.service.offload and windowed:
        return []
    return ["hipserve", "serve", served_name(name), *flags]


def _flags(made: Plan, chunk: int | None) -> list[str]:
    """The flags of vLLM, and what lets it read on."""
    service = made.service
    flags = ["--max-model-len", str(service.context), "--max-num-seqs", str(service.sequences)]
    flags += ["--max-num-batched-tokens", str(chunk)] if chunk else []
    flags += ["--tensor-parallel-size", str(service.cards)] if service.cards > 1 else []
    beyond = 0 < service.model.positions < service.context
    if beyond and service.config is not None and service.config.extend == "none":
        # Codes of few bits, which offloaded keys have on a GPU, are not streamed there.
        flags += ["--extend", "yarn" if service.offload and made.machine.on_gpu else "stream"]
    cache = service.model.cache_dtype
    flags += ["--kv-cache-dtype", cache] if cache != "auto" else []
    parts = made.parts
    if service.offload and made.machine.on_gpu:
        flags += ["--kv-offload", "--host-kv-memory", str(parts.pool)]
        flags += ["--kv-device-memory", str(made.arena)]
    elif service.offload:
        flags += ["--kv-file", "kv", "--host-kv-memory", str(parts.pool)]
    elif not made.machine.on_gpu:
        flags += ["--kv-cache-memory-bytes", str(parts.keys_values + parts.index + parts.windows)]
    return flags


def _settings_flags(
    config: Path | None,
    preset: str,
    budget: int | None,
    selector: str | None,
    code_bits: int | None,
    dtype: str,
) -> list[str]:
    """The flags of HiP attention and of weights, as they were given."""
    given = {"--config": config, "--budget": budget, "--selector": selector}
    given["--preset"] = preset if preset != "default" else None
    given |= {"--code-bits": code_bits, "--dtype": dtype if dtype != "auto" else None}
    return [word for key, value in given.items() if value is not None for word in (key, str(value))]
