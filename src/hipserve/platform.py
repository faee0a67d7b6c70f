"""What this machine can do: the only place that asks torch.cuda, Triton or the CPU's ISA."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform as python_platform
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from hipserve.errors import ArgumentError, BackendError, did_you_mean

logger = logging.getLogger("hipserve")

Backend = Literal["auto", "reference", "cpu", "triton"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Of keys and values in pages, beside queries in 16 or 32 bits."""
E4M3_CAPABILITY = (8, 9)
NATIVE_TIERS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
MAX_HEAD_DIM = {"cpu": 512, "triton": 512}
NATIVE_CALLS = 7
"""Version of the native kernels' calls, as `csrc/binding.cpp` counts it."""
HEAD_DIM_STEP = {"cpu": 16, "triton": 1}
"""The kernels of a backend take a head_dim that is a multiple of this, up to `MAX_HEAD_DIM`."""
GLUON_VERSIONS = ("3.6.",)
WIDE_FLOAT32_BYTES = 4 * 16 * 512 * 4
"""Shared memory of the search with head_dim above 256: summaries and the rows that read them."""


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """State of the native CPU kernels: the ISA tier they run, or why they do not run.

    `amx_refusal` says why the tier is not "amx"; empty where AMX can run.
    """

    tier: str | None
    reason: str = ""
    built: int = 0  # seconds, when the file was written
    amx_refusal: str = ""


@functools.cache
def native_library() -> NativeLibrary:
    """Loads the native CPU kernels once."""
    paths = [path for folder in library_folders() for path in folder.glob("_cpu*.so")]
    if not paths:
        return NativeLibrary(
            None, "hipserve was installed without its native kernels (no compiler)"
        )
    try:
        torch.ops.load_library(str(paths[0]))
        if getattr(torch.ops.hipserve_cpu, "calls", lambda: 1)() != NATIVE_CALLS:
            return NativeLibrary(
                None, "the native kernels are of another version: reinstall hipserve"
            )
        tier = NATIVE_TIERS[torch.ops.hipserve_cpu.isa()]
    except (OSError, RuntimeError) as error:
        return NativeLibrary(None, f"the native kernels do not load: {str(error).splitlines()[0]}")
    return NativeLibrary(tier, built=int(paths[0].stat().st_mtime), amx_refusal=_amx_refusal())


def library_folders() -> list[Path]:
    """Where the native kernels may lie: an editable install has them apart from the sources."""
    installed = importlib.metadata.distribution("hipserve").locate_file("hipserve")
    return [Path(str(installed)), Path(__file__).parent]


def _amx_refusal() -> str:
    """Why the kernels do not run on AMX; empty where they can."""
    code = torch.ops.hipserve_cpu.tile_refusal()  # as csrc/binding.cpp defines it
    known = {0: "", -1: "this CPU has no AMX", -2: "built without AMX (gcc 11 or newer has it)"}
    return known[code] if code in known else f"Linux refuses AMX tile data: {os.strerror(code)}"


def cpu_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the native CPU backend cannot run these tensors; empty if it can."""
    if device.type != "cpu":
        return f"the tensors are on {device}"
    return _dtype_refusal(dtype) or head_dim_refusal("cpu", head_dim) or native_library().reason


@functools.cache
def triton_library() -> str:
    """Why Triton's kernels cannot run here; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


def triton_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the Triton backend cannot run these tensors; empty if it can."""
    if device.type != "cuda" and not interpreting():
        return f"the tensors are on {device}, not on a GPU"
    refusal = _dtype_refusal(dtype) or head_dim_refusal("triton", head_dim) or triton_library()
    if not refusal and dtype == torch.float32 and head_dim > 256:
        room = gpu_shared_memory(device)
        if room < WIDE_FLOAT32_BYTES:
            return f"float32 with head_dim {head_dim} needs more shared memory than {room} bytes"
    return refusal


def key_refusal(backend: str, device: torch.device, dtype: torch.dtype | None) -> str:
    """Why a backend's kernels cannot read pages of this dtype, where it is not that of the queries;
    empty if they can."""
    if dtype not in FP8_DTYPES:
        return ""
    name = str(dtype).removeprefix("torch.")
    if backend == "cpu":
        return f"it reads no pages in {name}"
    if dtype == torch.float8_e4m3fn and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < E4M3_CAPABILITY:
            found = ".".join(map(str, capability))
            return f"{name} needs compute capability 8.9, and this GPU has {found}"
    return ""


def head_dim_refusal(backend: str, head_dim: int) -> str:
    """Why a backend's kernels cannot compute with this head_dim; empty if they can."""
    step, largest = HEAD_DIM_STEP[backend], MAX_HEAD_DIM[backend]
    if head_dim % step == 0 and 0 < head_dim <= largest:
        return ""
    multiples = f"multiples of {step}" if step > 1 else "1"
    return f"it computes with head_dim from {multiples} to {largest}, not {head_dim}"


def interpreting() -> bool:
    """Triton runs its kernels in Python, on CPU tensors (its tests do so)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _dtype_refusal(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return "" if dtype in DTYPES else f"it computes in bfloat16, float16 and float32, not {name}"


@functools.cache
def resolve_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    key_dtype: torch.dtype | None = None,
) -> str:
    """The backend that runs: the one asked for, or with `auto` the fastest that can.

    dtype: of queries.
    key_dtype: of pages, where they are read.

    Raises:
        ArgumentError: unknown name.
        BackendError: the named backend cannot run these tensors.
    """
    if backend not in get_args(Backend):
        raise ArgumentError(
            "backend",
            f"one of {', '.join(get_args(Backend))}",
            repr(backend),
            did_you_mean(str(backend), get_args(Backend)),
        )
    if backend == "reference":
        return backend
    name = backend if backend != "auto" else ("cpu" if device.type == "cpu" else "triton")
    refusal = (cpu_refusal if name == "cpu" else triton_refusal)(device, dtype, head_dim)
    refusal = refusal or key_refusal(name, device, key_dtype)
    if backend != "auto" and refusal:
        raise BackendError(f'backend="{name}" cannot run: {refusal}', 'use backend="auto"')
    return _announce("reference" if refusal else name, refusal)


@functools.cache
def _announce(backend: str, refusal: str) -> str:
    """Logs a choice the first time it is made: loudly where no fast backend can run."""
    slow = refusal in (native_library().reason, triton_library())
    slow = slow or "head_dim" in refusal or "float8" in refusal
    level = logging.WARNING if refusal and slow else logging.INFO
    logger.log(level, "attention backend: %s (%s)", backend, _reason(backend, refusal))
    return backend


def describe_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What `auto` runs for such tensors, with the ISA tier or the reason, as people read it."""
    chosen = resolve_backend("auto", device, dtype, head_dim)
    refusal = (cpu_refusal if device.type == "cpu" else triton_refusal)(device, dtype, head_dim)
    return f"{chosen} ({_reason(chosen, refusal)})"


def _reason(backend: str, refusal: str) -> str:
    tier = native_library().tier if backend == "cpu" else gpu_name() or "interpreted"
    return refusal or tier or ""


@functools.cache
def gpu_shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; a Hopper GPU's where there is no GPU."""
    if device.type != "cuda":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@functools.cache
def gpu_processors(device: torch.device) -> int:
    """Programs that are sure to run at the same time; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def chains_launches(device: torch.device) -> bool:
    """The GPU starts a kernel while the one before it ends (Hopper and later)."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def specialises_warps(device: torch.device) -> bool:
    """The GPU is a Hopper, and Triton has the language that gives warps roles.

    That language is young: only versions count with which the kernel was checked on a card, and
    of those only builds that have it.
    """
    if device.type != "cuda" or torch.version.hip is not None or triton_library():
        return False
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        triton = importlib.import_module("triton")
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError:
        return False
    return triton.__version__.startswith(GLUON_VERSIONS)


def default_device() -> str:
    """The device a command uses unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        ArgumentError: there is no such device on this machine.
    """
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in (*known, default_device()):
        if len(known) == 1:
            cuda = "no CUDA GPU is visible" if torch.version.cuda else "this torch has no CUDA"
            why = f" ({cuda})" if device.startswith(("cuda", "gpu")) else ""
            raise ArgumentError("device", "cpu", f"{device!r}{why}")
        hint = "did you mean cuda?" if device == "gpu" else did_you_mean(device, known)
        raise ArgumentError("device", f"one of {', '.join(known)}", repr(device), hint)
    return torch.device(device)


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """This CPU has instructions for torch's matrix products of this type, float32 or 16 bits.

    Without them a product of 16 bits takes several times as long as one in float32, for more than
    some ten rows.
    """
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", lambda: False)
    return kind is None or bool(supported())


def gpu_name() -> str | None:
    """Name of the first CUDA device."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def cpu_name() -> str:
    """Name of this machine's processor and the number of threads that torch uses."""
    name = python_platform.processor() or python_platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


@functools.cache
def cpu_identity() -> str:
    """What measurements of this machine's CPU kernels depend on, besides threads."""
    library = native_library()
    built = f", built {library.built}" if library.tier else ""
    return f"{cpu_name().rpartition(', ')[0]}, torch {torch.__version__}, {library.tier}{built}"


def measuring() -> bool:
    """Kernels may be measured on this machine: `HIPSERVE_MEASURE=0` forbids it."""
    return os.environ.get("HIPSERVE_MEASURE", "1") != "0"


def measurements_file() -> Path:
    """Where measurements of this user's machine are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hipserve" / "measured.json"


def measured(name: str, measure: Callable[[], Any], valid: Callable[[Any], bool]) -> Any:
    """The value kept under `name`, or that of `measure`, which is then kept.

    Processes that ask at the same time wait for the first. A file that cannot be read counts as
    empty; where none can be written, every process measures again.
    """
    path = measurements_file()
    with _alone(path):
        known = _read_json(path)
        if name in known and valid(known[name]):
            return known[name]
        value = measure()
        _write_json(path, {**known, name: value})
    return value


@contextlib.contextmanager
def _alone(path: Path) -> Generator[None]:
    """Excludes other processes, if the directory of `path` can be written."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (OSError, ImportError):
            pass
        yield


def _read_json(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", known) if isinstance(known, dict) else {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Readers see the old file or the new one."""
    new = path.with_suffix(f".{os.getpid()}")
    try:
        new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        new.replace(path)
    except OSError:
        logger.debug("%s cannot be written: the next process measures again", path)
