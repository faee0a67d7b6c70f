"""Refuses, before a server starts, what the memory of a machine cannot hold."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from hipserve.capacity.advice import readable
from hipserve.capacity.cards import CHUNK, UTILIZATION, chunk_of_card
from hipserve.capacity.memory import BLOCK, Parts, Room, Service
from hipserve.capacity.shape import ModelShape
from hipserve.errors import FitError
from hipserve.host import HostMemory, InstalledGpu
from hipserve.serving.command_line import HostedBlocks, Server
from hipserve.serving.environment import kv_memory

OTHER_SHAPES = ("--hf-overrides", "--quantization", "-q", "--speculative-config", "--config-format")
"""Flags with which a server keeps something else than config.json says."""

FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
"""Suffixes of vLLM's numbers."""


def check_fit(
    server: Server, shape: ModelShape, host: HostMemory, gpu: InstalledGpu | None = None
) -> None:
    """Refuses a model whose weights and KV cache exceed what the machine has available, and a KV
    cache that cannot hold one sequence of the context: vLLM would say so after loading.

    gpu: with offload, where the model is.

    Raises:
        FitError: with the numbers and the nearest flags that fit.
    """
    if server.offload is not None:
        check_pool(server, shape)
        if server.offload.file is not None:
            check_hosted(server, shape, host)
        elif gpu is not None:
            check_card(server, shape, gpu, host)
        return
    if server.num_workers > 1 or any(server.option(flag) is not None for flag in OTHER_SHAPES):
        return
    parts = wanted(server, shape).parts()
    cache = parts.keys_values + parts.index + parts.windows
    rest, given = parts.device - cache, kv_memory(server.option, host)
    if rest + (given or 0) > host.available:
        raise FitError(
            f"{server.name} does not fit this machine: {_sum(parts, rest, given)}, and "
            f"{_available(host)}",
            f"--kv-cache-memory-bytes {host.available - rest}" if rest < host.available else "",
        )
    if given is not None and cache > given:
        raise _too_long(server, shape, host, given)


def host_blocks(server: Server, shape: ModelShape) -> HostedBlocks:
    """KV blocks whose keys and values the host memory of a server's `offload` holds."""
    assert server.offload is not None
    size, part = number(server.option("--block-size")) or BLOCK, part_of(server, shape)
    count = server.offload.host_bytes // (size * _token_bytes(server, shape))
    token = Service(part, server.config, size).index_token_bytes
    return HostedBlocks(count, math.ceil(count * size * token))


def part_of(server: Server, shape: ModelShape) -> ModelShape:
    """What one worker has of a model, the one with most of it."""
    return shape.part(server.cards).stage(server.stages)


def _token_bytes(server: Server, shape: ModelShape) -> int:
    """Keys and values of a token, in all workers together: several may have the same head."""
    return shape.full_layers * server.cards * shape.part(server.cards).row_bytes


def check_pool(server: Server, shape: ModelShape) -> None:
    """Refuses a file or a pool that does not hold one sequence and vLLM's empty block.

    Raises:
        FitError: with the nearest flags that fit.
    """
    service, (blocks, _) = wanted(server, shape), host_blocks(server, shape)
    size = number(server.option("--block-size")) or BLOCK
    needed = -(-service.context // size) + 1
    if blocks < needed:
        room = max(blocks - 1, 0) * size
        memory = needed * size * _token_bytes(server, shape)
        raise FitError(
            f"a sequence of {service.context:,} tokens needs {readable(memory)} for keys and "
            f"values, and {blocks} blocks fit --host-kv-memory",
            f"--max-model-len {room} or --host-kv-memory {memory}" if room else "",
        )


def check_hosted(server: Server, shape: ModelShape, host: HostMemory) -> None:
    """The same for weights and the index of all blocks, in the memory of a CPU machine.

    Raises:
        FitError: with the numbers.
    """
    _, index = host_blocks(server, shape)
    parts = replace(wanted(server, shape), offload=True).parts()
    total = parts.device - parts.index + index
    if total > host.available:
        raise FitError(
            f"{server.name} does not fit this machine: weights {readable(parts.weights)} + "
            f"processes {readable(total - parts.weights - index)} + index {readable(index)} = "
            f"{readable(total)}, and {_available(host)}",
            "lower --host-kv-memory, whose blocks the index describes",
        )


def check_card(server: Server, shape: ModelShape, gpu: InstalledGpu, host: HostMemory) -> None:
    """The same for the memory of a GPU, with tiles and the pages of a text that is read; and for
    the pool on the host. Several GPUs share the model and the pool, and each has tiles.

    Raises:
        FitError: with the numbers.
    """
    assert server.offload is not None
    (_, index), arena = host_blocks(server, shape), _tiles(server)
    parts, rest, room = _on_card(server, shape, gpu)
    if index + arena > room:
        total, pool = parts.weights + index + arena + rest, largest_pool(server, shape, gpu)
        raise FitError(
            f"{server.name} does not fit {gpu.name}: weights {readable(parts.weights)} + index "
            f"{readable(index)} + tiles {readable(arena)} + staging and steps {readable(rest)} = "
            f"{readable(total)}, and {readable(room + parts.weights + rest)} may be used",
            f"--host-kv-memory {pool}" if pool > 0 else "lower --kv-device-memory",
        )
    if arena < parts.arena:
        raise FitError(
            f"tiles that one step reads take {readable(parts.arena)}, and --kv-device-memory is "
            f"{readable(arena)}",
            f"--kv-device-memory {parts.arena}",
        )
    if server.offload.host_bytes > host.available:
        asked = readable(server.offload.host_bytes)
        raise FitError(f"--host-kv-memory is {asked}, and {_available(host)}")


def _on_card(server: Server, shape: ModelShape, gpu: InstalledGpu) -> tuple[Parts, int, int]:
    """What a server with offload keeps on a GPU; bytes of staging and steps; and those that are
    left for index and tiles of the share that vLLM may use."""
    chunk = chunk_of_card(gpu.name, gpu.memory)
    part = part_of(server, shape)
    parts = replace(wanted(server, part, chunk), offload=True, on_gpu=True).parts()
    rest = parts.activations + parts.reserve + parts.table + parts.staging
    share = float(server.option("--gpu-memory-utilization") or UTILIZATION)
    return parts, rest, int(gpu.memory * share) - parts.weights - rest


def _tiles(server: Server) -> int:
    """Bytes of tiles on each card."""
    assert server.offload is not None
    return server.offload.of_card(server.cards * server.stages).device_bytes


def largest_pool(server: Server, shape: ModelShape, gpu: InstalledGpu) -> int:
    """Bytes of the largest pool whose index and tiles fit the GPU, whose tiles are not smaller than
    asked for; 0 or less where there is none."""
    assert server.offload is not None
    (_, index), (_, _, room) = host_blocks(server, shape), _on_card(server, shape, gpu)
    pool, tiles = server.offload.host_bytes, _tiles(server)
    if server.offload.device_memory is None:
        return int(pool * room / (index + tiles))
    return int(pool * (room - tiles) / index)


def wanted(server: Server, shape: ModelShape, chunk: int = CHUNK) -> Service:
    """One sequence of the context that a server is to have, read in chunks of so many tokens unless
    a flag says otherwise."""
    context = number(server.option("--max-model-len")) or shape.positions or BLOCK
    chunk = number(server.option("--max-num-batched-tokens")) or chunk
    return Service(shape, server.config, context, chunk=chunk, on_gpu=False)


def number(text: str | None) -> int | None:
    """A whole number as vLLM takes it: 32k is 32,000 and 32K is 32,768; None for other words."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text or "")
    return int(float(found[1]) * FACTORS[found[2]]) if found else None


def _too_long(server: Server, shape: ModelShape, host: HostMemory, given: int) -> FitError:
    service = wanted(server, shape)
    parts = service.parts()
    cache = parts.keys_values + parts.index + parts.windows
    room = Room(parts.device - cache + given, 0)
    longest, rest = room.longest_context(service), parts.device - cache
    hints = [f"--max-model-len {longest}"] if longest else []
    hints += [f"--kv-cache-memory-bytes {cache}"] if rest + cache <= host.available else []
    return FitError(
        f"a sequence of {service.context:,} tokens needs {readable(cache)} of KV cache, and it "
        f"has {readable(given)}",
        " or ".join(hints),
    )


def _sum(parts: Parts, rest: int, given: int | None) -> str:
    other = rest - parts.weights
    cache = f" + KV cache {readable(given)}" if given else ""
    total = readable(rest + (given or 0))
    return f"weights {readable(parts.weights)} + processes {readable(other)}{cache} = {total}"


def _available(host: HostMemory) -> str:
    limit = f" in a container of {readable(host.container)}" if host.container else ""
    return f"{readable(host.available)} are available{limit}"
