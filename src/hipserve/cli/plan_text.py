"""What `plan` prints: a plan as people read it, and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any

from hipserve.capacity.advice import ANY_FILE, Machine, Plan, readable
from hipserve.capacity.memory import RESERVE, Parts, index_per_token
from hipserve.capacity.shape import ModelShape
from hipserve.cli.numbers import counted
from hipserve.host import HostMemory
from hipserve.models.bundled import BUNDLED

PLACEHOLDER = "MODEL"
"""Stands in a command for a checkpoint of which only the config.json is here."""


def lines(made: Plan, model: str, command: list[str]) -> Iterator[str]:
    """The plan as people read it; `model` as from `describe_model`."""
    service, parts = made.service, made.parts
    yield _line("model", model)
    yield _line("machine", describe_machine(made.machine))
    if service.offload and made.machine.on_gpu and made.machine.host:
        yield _line("host", describe_host(made.machine.host))
    if service.cards > 1:
        share = f"{service.cards}, each with its share of the model, its keys and their index"
        yield _line("cards", f"{share}: memory is that of one")
    yield _line("to serve", f"{service.sequences} x {service.context:,} tokens")
    yield ""
    yield from _memory_lines(made, parts)
    yield ""
    yield _line("fits", "yes" if made.fits else "no")
    if made.fits:
        yield _line("longest", _longest(made))
        most = counted(made.most_sequences, "sequence")
        yield _line("most", f"{most} of this context at once")
        yield from _speed_lines(made)
        if command:
            yield _line("command", shlex.join(command))
        if service.offload and made.machine.on_gpu and service.cards == 1:
            search = {key: getattr(service.config, key) for key in ("code_bits", "rerank")}
            sizes = f"host_memory={parts.pool}, device_memory={made.arena}"
            yield _line("in Python", f"HiPCache(model.config, offload=Offload({sizes}))")
            yield _line("", f"with model.config.hip = {dumps(search)}")
    else:
        yield from (_line("", text) for text in made.nearest())
    yield from (_line("note", text) for text in notes(made, command))


def _longest(made: Plan) -> str:
    """Tokens, and how many of them the model was made for."""
    longest, positions = made.longest_context, made.service.model.positions
    beyond = f", beyond {positions:,} with --extend" if 0 < positions < longest else ""
    return f"{longest:,} tokens of context by memory{beyond}"


def notes(made: Plan, command: list[str]) -> list[str]:
    """What to know besides, also about the command."""
    found = list(made.notes())
    if made.fits and PLACEHOLDER in command:
        found.append(
            f"{PLACEHOLDER} is the checkpoint's directory or hub name: a config.json "
            "alone cannot be served"
        )
    return found


def served_name(name: str) -> str:
    """What `serve` takes for a model that a plan was made for."""
    path = Path(name).expanduser()
    folder = path.parent if path.is_file() else path
    if name == BUNDLED or not folder.is_dir():
        return name
    return str(folder) if any(folder.glob("*.safetensors")) else PLACEHOLDER


def _line(name: str, text: str) -> str:
    return f"{name:<10}{text}"


def describe_model(name: str, shape: ModelShape) -> str:
    windowed = len(shape.windows) - shape.full_layers
    layers = f"{len(shape.windows)} layers" + (f" ({windowed} with a window)" if windowed else "")
    how = f", weights in {shape.weights.quantised}" if shape.weights.quantised else ""
    how += f", keys and values in {shape.cache_dtype}" if shape.cache_dtype != "auto" else ""
    return (
        f"{name}: {shape.family}, {_parameters(shape)} parameters, {layers}, "
        f"{shape.num_kv_heads} KV heads of {shape.head_dim}, {shape.dtype}{how}"
    )


def _parameters(shape: ModelShape) -> str:
    count = shape.weights.parameters
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


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
        of += ", of all cards together" if service.cards > 1 else ""
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
        "cards": service.cards,
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
        "notes": notes(made, command),
        "command": command or None if made.fits else None,
    }
