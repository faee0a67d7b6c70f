"""`hipserve serve`: vLLM's OpenAI-compatible server with HiP attention."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from hipserve.capacity.shape import ModelShape
from hipserve.cli import offloading, options
from hipserve.cli.numbers import parse_count, parse_size
from hipserve.cli.output import err, result
from hipserve.cli.ready import Teller, card
from hipserve.errors import ArgumentError, HipserveError
from hipserve.host import HostMemory, InstalledGpu, installed_gpu
from hipserve.integrations.extend import check_rope, text_config, yarn_parameters
from hipserve.integrations.vllm.command import find_version
from hipserve.models.bundled import BUNDLED, bundled_path
from hipserve.models.config_file import read_config
from hipserve.models.gguf_files import find_gguf
from hipserve.models.names import check_name
from hipserve.offload import Offload
from hipserve.serving.address import check_access, check_port
from hipserve.serving.child import Child
from hipserve.serving.client import Client
from hipserve.serving.command_line import Server, quick_start, short_answers
from hipserve.serving.engine_file import is_engine_file, read_engine_file
from hipserve.serving.environment import on_cpu
from hipserve.serving.fit import check_fit, host_blocks, largest_pool
from hipserve.serving.log_words import complaint, refusal, stage_of
from hipserve.serving.refusals import (
    check_context,
    check_flags,
    check_known,
    check_settings,
)

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
USAGE = "[MODEL] [OPTIONS] [OPTIONS OF VLLM]"


def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VLLM_API_KEY", help="API key that clients must send."),
    ] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option(help="Accept other machines without a key.")
    ] = False,
    budget: options.Budget = None,
    selector: options.Selector = None,
    code_bits: options.CodeBits = None,
    kv_offload: offloading.KvOffload = False,
    kv_file: offloading.KvFile = None,
    host_kv_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Room for them, such as 64GiB; half of what is available, or needed for a file.",
        ),
    ] = None,
    kv_device_memory: offloading.KvDeviceMemory = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    extend: options.Extend = None,
    meter: options.Meter = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="vLLM's dense attention instead of HiP.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="vLLM's log during the start.")] = False,
) -> None:
    """Serves MODEL, the bundled one if left out, through vLLM.

    vLLM's own flags work as well: `hipserve-vllm serve --help=all` lists them.
    """
    words = context.args
    named = bool(words) and not words[0].startswith("-")
    flags, held = tuple(words[1:] if named else words), tuple[str, ...]()
    model = words[0] if named else BUNDLED
    find_version()
    if config is not None and is_engine_file(config):
        flags, held = ("--config", str(config), *flags), read_engine_file(config)
        config = None
    check(model, (*flags, *held))
    check_access(host, api_key, allow_unauthenticated)
    check_port(host, port)
    sizes = (host_kv_memory, kv_device_memory)
    offload = make_offload(kv_file, *sizes, dense=dense, on_host=kv_offload)
    given = (config, preset, budget, selector, code_bits)
    if dense:
        options.refuse_with_dense(*given, meter=meter, extend=extend)
    settings = None if dense else options.make_config(*given, extend=extend, meter=meter)
    if offload is not None and settings is not None:
        settings = offloading.offloaded(settings, code_bits, config, None if on_cpu() else preset)
    path = model
    if model == BUNDLED:
        path, flags = str(bundled_path()), (*quick_start(flags), *short_answers(flags), *flags)
    server = Server(
        path, model, settings, host, port, api_key=api_key, flags=flags, file_flags=held
    )
    if settings is not None and settings.extend != "none":
        server = extended(server, read_config(server.model))
    shape = shape_of(server)
    server = replace(server, offload=offload)
    table = table_of(server.model)
    check_context(server, table)
    check_settings(server, table, shape and shape.dtype)
    if offload is not None:
        server = with_offload(server, offload, shape)
    memory, gpu = HostMemory.read(), None if on_cpu() else installed_gpu()
    if offload is not None and shape is not None and gpu is not None and host_kv_memory is None:
        server = with_pool_for(gpu, server, shape)
    if shape is not None and memory is not None and (on_cpu() or offload is not None):
        check_fit(server, shape, memory, gpu)
    run(server, verbose)


def extended(server: Server, table: dict[str, Any]) -> Server:
    """The server with a context beyond the trained length of its model, whose config.json is
    `table`: what vLLM reads of it is overridden.

    Raises:
        ArgumentError: flags override it already, or the model says no length or cannot be extended.
    """
    assert server.config is not None
    config = server.config
    trained = config.trained_length or int(table.get("max_position_embeddings") or 0)
    given = server.option("--hf-overrides")
    if given is not None or not trained:
        got = f"--hf-overrides {given}" if trained else "a config.json without it"
        hint = "leave one of them out" if trained else "set trained_length in --config"
        raise ArgumentError("extend", "a model with max_position_embeddings, as it is", got, hint)
    model = text_config(table)
    model.max_position_embeddings = trained
    check_rope(model, config.extend)
    asked = server.option("--max-model-len")
    length = parse_count(asked) if asked else int(config.extend_factor * trained)
    overrides: dict[str, Any] = {"max_position_embeddings": length}
    if config.extend == "yarn":
        overrides = {"rope_parameters": yarn_parameters(model, max(length / trained, 1.0))}
    flags = ("--hf-overrides", json.dumps(overrides))
    if not asked:
        flags += ("--max-model-len", str(length))
    config = config.replace(trained_length=trained)
    return replace(server, config=config, flags=(*server.flags, *flags))


def make_offload(
    file: Path | None,
    memory: int | None,
    device_memory: int | None = None,
    *,
    dense: bool = False,
    on_host: bool = False,
) -> Offload | None:
    """Where keys and values live, if not in KV blocks; in half of the memory that is available
    where no size is given for those of a GPU.

    Raises:
        ArgumentError: the options do not go together, or not with this machine.
    """
    device = "cpu" if on_cpu() else "cuda"
    asked = (on_host, file, memory, device_memory)
    if not offloading.is_asked_for(*asked, device=device, dense=dense):
        return None
    host = HostMemory.read()
    if memory is None and (file is not None or host is None):
        hint = "add --host-kv-memory, such as 64GiB"
        raise ArgumentError("host_kv_memory", "the size of the file or of the pool", "none", hint)
    if memory is None and host is not None:
        memory = host.available // 2
    assert memory is not None
    return Offload(memory, device_memory, file and file.absolute())


def with_offload(server: Server, offload: Offload, shape: ModelShape | None) -> Server:
    """The server with as many KV blocks as the file or the host's memory holds.

    Raises:
        ArgumentError: nobody knows the size of a block, or some layers have a window.
    """
    name = "kv_offload" if offload.file is None else "kv_file"
    if shape is None:
        expected = "a model whose config.json is on this machine"
        raise ArgumentError(name, expected, server.model)
    if shape.full_layers < len(shape.windows):
        expected = "a model whose layers all read every key"
        raise ArgumentError(name, expected, f"{shape.family}, some with a window")
    server = replace(server, offload=offload)
    return replace(server, hosted=host_blocks(server, shape))


def with_pool_for(gpu: InstalledGpu, server: Server, shape: ModelShape) -> Server:
    """The server with no larger a pool than the GPU has room for its index and tiles."""
    assert server.offload is not None
    pool = largest_pool(server, shape, gpu)
    if not 0 < pool < server.offload.host_bytes:
        return server
    return with_offload(server, replace(server.offload, host_memory=pool), shape)


def table_of(model: str) -> dict[str, Any] | None:
    """What a model's config.json says; None where it is not on this machine."""
    try:
        return read_config(model)
    except ArgumentError:
        return None


def shape_of(server: Server) -> ModelShape | None:
    """The shape of the model that is served; None where its config.json is not here, or describes
    none that is known: vLLM has to say what it makes of it."""
    table = table_of(server.model)
    try:
        own = ModelShape.of(table or {})
    except ArgumentError:
        return None
    dtype = server.option("--dtype") or "auto"
    if dtype == "auto":  # what vLLM makes of checkpoints in float32
        dtype = "bfloat16" if own.dtype == "float32" else own.dtype
    shape = ModelShape.of(table or {}, {"float": "float32", "half": "float16"}.get(dtype, dtype))
    return replace(shape, cache_dtype=server.option("--kv-cache-dtype") or "auto")


def check(model: str, flags: tuple[str, ...]) -> None:
    """Refuses, before a server starts, a path that does not exist and flags that cannot work."""
    _refuse_gguf(model)
    check_name(model)
    check_flags(flags)
    check_known(flags)


def _refuse_gguf(model: str) -> None:
    if model != BUNDLED and find_gguf(model):
        hint = "hipserve run, chat and eval read GGUF; serve the model's safetensors checkpoint"
        raise ArgumentError("model", "a directory or hub name, as vLLM reads no GGUF", model, hint)


def run(server: Server, verbose: bool = False) -> None:
    """Starts the server, shows its progress and the ready card, and waits for its end.

    Raises:
        BackendError: the server ended before it was ready; the message says why.
    """
    child = Child(server.command(), server.environment())
    try:
        child.pass_signals_on()
        if server.answers:
            _wait_until_ready(server, child, verbose)
        child.log.follow(sys.stderr)
    finally:
        code = child.stop()
    if code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise HipserveError(f"the server ended ({how}); its last lines are above")


def _wait_until_ready(server: Server, child: Child, verbose: bool) -> None:
    client, teller = Client(server), Teller(server.name)

    def tell(line: str | None) -> None:
        if line is not None and verbose:
            err.print(line, markup=False, highlight=False, soft_wrap=True)
        teller.tell(line and stage_of(line))

    with teller:
        child.wait_until(client.healthy, tell)
    if child.ready:
        result(card(server, client.facts(), teller.seconds, shape_of(server)))
    elif not child.stopping:
        lines = child.log.last_words()
        raise refusal(complaint(lines), lines, server.model, on_cpu())
