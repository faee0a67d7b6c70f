"""Options that put keys and values into host memory or a file, and what they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipserve.capacity.advice import OFFLOAD_CODE_BITS, OFFLOAD_RERANK
from hipserve.cli.numbers import parse_size
from hipserve.cli.options import parse_path
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.host import HostMemory
from hipserve.offload import Offload

if TYPE_CHECKING:
    from hipserve.models import LoadedModel

FEWEST_KEYS = 4096
"""Keys and values of so many tokens stay on a GPU unless told otherwise: more than a step reads."""

KvOffload = Annotated[
    bool, typer.Option("--kv-offload", help="Keys and values in host memory; with a GPU.")
]
KvFile = Annotated[
    Path | None,
    typer.Option(
        parser=parse_path, metavar="PATH", help="Keys and values in a file made here; on CPUs."
    ),
]
HostKvMemory = Annotated[
    int | None,
    typer.Option(
        parser=parse_size, metavar="SIZE", help="Room for them, such as 64GiB; a whole context."
    ),
]
KvDeviceMemory = Annotated[
    int | None,
    typer.Option(
        parser=parse_size, metavar="SIZE", help="Room on the GPU for those in use; an eighth."
    ),
]


def is_asked_for(
    offload: bool,
    file: Path | None,
    host_memory: int | None,
    device_memory: int | None,
    *,
    device: str | None,
    dense: bool = False,
) -> bool:
    """Keys and values are kept apart from the model.

    Raises:
        ArgumentError: the options do not go together, or not with this device.
    """
    sizes = {"host_kv_memory": host_memory, "kv_device_memory": device_memory}
    if not offload and file is None:
        for name, size in sizes.items():
            if size is not None:
                raise ArgumentError(name, "--kv-offload or --kv-file with it", "neither")
        return False
    if device is None:
        from hipserve.platform import default_device

        device = default_device()
    on_cpu = device.startswith("cpu")
    if dense:
        got = "--kv-offload" if offload else "--kv-file"
        raise ArgumentError("--dense", "no offloading with it: it reads every key", got)
    if offload and on_cpu:
        raise ArgumentError("kv_offload", "a model on a GPU", "a CPU", "use --kv-file PATH")
    if file is not None and not on_cpu:
        raise ArgumentError("kv_file", "a model on a CPU", "a GPU", "use --kv-offload")
    if device_memory is not None and on_cpu:
        raise ArgumentError("kv_device_memory", "a model on a GPU", "a CPU", "leave it out")
    return True


def searching_codes(settings: HiPConfig, config: Path | None, preset: str | None) -> HiPConfig:
    """The settings for offloading, unless a file says what they are: a search on codes, and of more
    candidates where nobody chose how many."""
    if config is not None:
        return settings
    rerank = OFFLOAD_RERANK if preset == "default" else settings.rerank
    return settings.replace(code_bits=OFFLOAD_CODE_BITS, rerank=rerank)


def offloaded(
    settings: HiPConfig, code_bits: int | None, config: Path | None, preset: str | None
) -> HiPConfig:
    """The settings of a plan with keys on the host, which a search cannot read there."""
    if code_bits is None:
        settings = searching_codes(settings, config, preset)
    if settings.code_bits == 16:
        expected = "4 or 8 where keys are offloaded: a search cannot read them"
        raise ArgumentError("code_bits", expected, "16")
    return settings


def make_offload(
    loaded: LoadedModel, file: Path | None, host_memory: int | None, device_memory: int | None
) -> Offload:
    """Where keys and values of this model go; a whole context of it where no size is given, but at
    most half of the memory that is available."""
    token, memory = loaded.kv_token_bytes, HostMemory.read()
    if host_memory is None:
        host_memory = token * (loaded.max_context + FEWEST_KEYS)
        if file is None and memory is not None:
            host_memory = min(host_memory, memory.available // 2)
    if device_memory is None and file is None:
        device_memory = max(host_memory // 8, token * FEWEST_KEYS)
    return Offload(host_memory, device_memory, file)
