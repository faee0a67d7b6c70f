"""`hipserve plan`: what a model takes on a card, what fits, and the flags for it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from hipserve.capacity.advice import ANY_FILE, Machine, Plan, readable
from hipserve.capacity.cards import CARDS, CHUNK, chunk_of_card, find_card, recognise
from hipserve.capacity.memory import RESERVE, Parts, Service, index_per_token
from hipserve.capacity.shape import DTYPE_BYTES, ModelShape
from hipserve.cli import options
from hipserve.cli.numbers import at_least, parse_size
from hipserve.cli.offloading import offloaded
from hipserve.cli.output import result, result_json
from hipserve.errors import ArgumentError
from hipserve.host import HostMemory, installed_gpu
from hipserve.models.bundled import BUNDLED
from hipserve.models.config_file import read_config


def plan(
    model: options.Model = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1),
            metavar="TOKENS",
            help="Context, such as 1M; all positions of the model if left out.",
        ),
    ] = None,
    max_num_seqs: Annotated[
        int,
        typer.Option(
            parser=at_least(1), metavar="NUMBER", help="Sequences of that context at once."
        ),
    ] = 1,
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
    json: options.Json = False,
) -> None:
    """Says what a model takes on a card, from its config.json alone; exit code 1 if it does not
    fit. Nothing is loaded or downloaded."""
    name = model or BUNDLED
    if dtype not in ("auto", *DTYPE_BYTES):
        raise ArgumentError("dtype", f"one of auto, {', '.join(DTYPE_BYTES)}", repr(dtype))
    shape = ModelShape.of(read_config(name), dtype)
    machine = find_machine(gpu, device_memory)
    settings = options.make_config(config, preset, budget, selector, code_bits)
    if kv_offload:
        settings = offloaded(settings, code_bits, config, preset if machine.on_gpu else None)
    service = Service(
        model=shape,
        config=settings,
        context=max_model_len or shape.positions or 32_768,
        sequences=max_num_seqs,
        chunk=max_num_batched_tokens or default_chunk(machine),
        offload=kv_offload,
        on_gpu=machine.on_gpu,
    )
    made = Plan(service, machine, machine.room(host_kv_memory))
    given = _settings_flags(config, preset, budget, selector, code_bits)
    command = _command(made, name, [*_flags(made, max_num_batched_tokens), *given])
    if json:
        result_json(as_table(made, command))
    else:
        result("\n".join(lines(made, name, command)))
    if not made.fits:
        raise typer.Exit(1)


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
    return [] if made.service.offload and windowed else ["hipserve", "serve", name, *flags]


def _flags(made: Plan, chunk: int | None) -> list[str]:
    """The flags of vLLM."""
    service = made.service
    flags = ["--max-model-len", str(service.context), "--max-num-seqs", str(service.sequences)]
    flags += ["--max-num-batched-tokens", str(chunk)] if chunk else []
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
) -> list[str]:
    """The flags of HiP attention, as they were given."""
    given = {"--config": config, "--budget": budget, "--selector": selector}
    given["--preset"] = preset if preset != "default" else None
    given["--code-bits"] = code_bits
    return [word for key, value in given.items() if value is not None for word in (key, str(value))]


def lines(made: Plan, name: str, command: list[str]) -> Iterator[str]:
    """The plan as people read it."""
    service, parts = made.service, made.parts
    yield _line("model", describe_model(name, service.model))
    yield _line("machine", describe_machine(made.machine))
    if service.offload and made.machine.on_gpu and made.machine.host:
        yield _line("host", describe_host(made.machine.host))
    yield _line("to serve", f"{service.sequences} x {service.context:,} tokens")
    yield ""
    yield from _memory_lines(made, parts)
    yield ""
    yield _line("fits", "yes" if made.fits else "no")
    if made.fits:
        yield _line("longest", f"{made.longest_context:,} tokens of context by memory")
        yield _line("most", f"{made.most_sequences:,} sequences of this context at once")
        yield from _speed_lines(made)
        if command:
            yield _line("command", shlex.join(command))
        if service.offload and made.machine.on_gpu:
            search = {key: getattr(service.config, key) for key in ("code_bits", "rerank")}
            sizes = f"host_memory={parts.pool}, device_memory={made.arena}"
            yield _line("in Python", f"HiPCache(model.config, offload=Offload({sizes}))")
            yield _line("", f"with model.config.hip = {dumps(search)}")
    else:
        yield from (_line("", text) for text in made.nearest())
    yield from (_line("note", text) for text in made.notes())


def _line(name: str, text: str) -> str:
    return f"{name:<10}{text}"


def describe_model(name: str, shape: ModelShape) -> str:
    windowed = len(shape.windows) - shape.full_layers
    layers = f"{len(shape.windows)} layers" + (f" ({windowed} with a window)" if windowed else "")
    how = f", weights in {shape.weights.quantised}" if shape.weights.quantised else ""
    return (
        f"{name}: {shape.family}, {shape.weights.parameters / 1e9:.3g} B parameters, {layers}, "
        f"{shape.num_kv_heads} KV heads of {shape.head_dim}, {shape.dtype}{how}"
    )


def describe_machine(machine: Machine) -> str:
    if not machine.on_gpu:
        return f"{machine.title}: {readable(machine.memory)} available"
    card, text = machine.card, f"{machine.title}: {readable(machine.memory)}"
    if card is not None:
        text += f", {card.bandwidth / 1e12:.3g} TB/s, PCIe {card.pcie} x16"
        text += f" ({card.link / 1e9:.0f} GB/s)"
    return text


def _memory_lines(made: Plan, parts: Parts) -> Iterator[str]:
    service, machine, room = made.service, made.machine, made.room
    config, model = service.config, service.model
    index = index_per_token(config, model) if config and model.full_layers else ""
    tiles = f"{service.step_tiles * service.sequences:,} tiles a head are its floor"
    rows = {
        "weights": (parts.weights, ""),
        "keys and values": (parts.keys_values, f"{service.kv_token_bytes:,} bytes a token"),
        "index": (parts.index, index),
        "layers with a window": (parts.windows, ""),
        "arena": (made.arena, tiles),
        "table of tiles": (parts.table, ""),
        "staging": (parts.staging, "two layers of one context"),
        "activations": (parts.activations, f"steps of {service.chunk:,} tokens"),
        "graphs, processes": (RESERVE, "a flat sum"),
    }
    for name, (size, about) in rows.items():
        if size:
            yield f"  {name:<22}{readable(size):>12}  {about}".rstrip()
    taken = parts.device - parts.arena + made.arena
    of = f"of {readable(room.device)}"
    of += f", {machine.share:.0%} of the card" if machine.share != 1 else " available"
    yield f"  {'in all':<22}{readable(taken):>12}  {of}"
    if parts.pool:
        name = "pool on the host" if machine.on_gpu else "file"
        of = f"  of {readable(room.host)}" if room.host < ANY_FILE else ""
        yield f"  {name:<22}{readable(parts.pool):>12}{of}"


def describe_host(host: HostMemory) -> str:
    """What this machine has, if a pool is to lie here."""
    limit = f"limit of the container {readable(host.container)}" if host.container else ""
    has = f"{readable(host.available)} available of {readable(host.total)}"
    return f"this machine: {has}, {limit or 'no container limit'}"


def _speed_lines(made: Plan) -> Iterator[str]:
    speeds = made.speeds()
    if not speeds:
        yield _line("speed", "no estimate: bandwidths are known of the cards of --gpu only")
    for hit, speed in speeds.items():
        at = "" if hit == "resident" else f", {float(hit):.0%} of the tiles on the card"
        yield _line("speed", f"at most {speed:,.0f} tokens/s in all{at}")
    if speeds:
        yield _line("", "(an estimate: bytes over bandwidth; kernels take longer)")


def as_table(made: Plan, command: list[str]) -> dict[str, Any]:
    """The plan as JSON."""
    service, machine = made.service, made.machine
    config = service.config.to_dict() if service.config else None
    return {
        "model": {**asdict(service.model), "windows": list(service.model.windows)},
        "machine": {"title": machine.title, "memory": machine.memory, "share": machine.share},
        "host": asdict(machine.host) if machine.host else None,
        "context": service.context,
        "sequences": service.sequences,
        "chunk": service.chunk,
        "offload": service.offload,
        "config": config,
        "kv_token_bytes": service.kv_token_bytes,
        "index_token_bytes": service.index_token_bytes,
        "parts": {**asdict(made.parts), "arena": made.arena, "arena_floor": made.parts.arena},
        "room": asdict(made.room),
        "fits": made.fits,
        "longest_context": made.longest_context,
        "most_sequences": made.most_sequences,
        "tokens_per_second_at_most": made.speeds(),
        "nearest": [] if made.fits else list(made.nearest()),
        "notes": list(made.notes()),
        "command": command or None if made.fits else None,
    }
