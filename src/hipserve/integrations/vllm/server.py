"""vLLM's OpenAI server as a child process: its command line, its environment, its start.

Nothing here imports vLLM or torch, so that a command can speak from its first moment.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import re
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hipserve.config import HiPConfig
from hipserve.errors import ConfigError
from hipserve.integrations.vllm import OPTIONS_KEY
from hipserve.integrations.vllm.flags import normal

COMMAND = "hipserve.integrations.vllm.command"
DRAIN_SECONDS = 30
"""How long a server that is told to stop goes on answering what it has begun."""

SPIN_COUNT = 20_000
"""Turns, some tenths of a millisecond, that an idle OpenMP thread waits before it gives its core
away: longer than the gaps within a decode step, shorter than those between steps, when the API
server and its clients need the cores. OpenMP's own default spins through both."""

STAGES = (
    ("Platform plugin", "vLLM is reading its configuration"),
    ("Starting to load model", "loading the model"),
    ("Loading weights took", "the model is loaded"),
    ("KV cache size", "laying out the KV cache"),
    ("Warming up model", "compiling the model"),
    ("init engine", "the engine runs"),
    ("Starting vLLM server", "opening the address"),
)
"""What vLLM's log lines mean to somebody who waits."""


@dataclass(frozen=True, slots=True)
class Server:
    """What to serve and where.

    Attributes:
        model: a directory or a hub name.
        name: what clients call it.
        config: HiP attention's settings; None serves with vLLM's own dense attention.
        host, port: the address.
        api_key: what clients have to send; None lets everybody in.
        flags: vLLM's own flags, passed on as they are.
        file_flags: those that vLLM reads by itself, from its own file of flags.
    """

    model: str
    name: str
    config: HiPConfig | None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    flags: tuple[str, ...] = field(default=())
    file_flags: tuple[str, ...] = field(default=())

    def command(self) -> list[str]:
        """The command line of the child process."""
        words = [sys.executable, "-m", COMMAND, "serve", self.model]
        words += ["--host", self.host, "--port", str(self.port)]
        words += self._defaults({"--served-model-name": self.name})
        words += self._defaults({"--shutdown-timeout": str(DRAIN_SECONDS)})
        if not {"--gpu-memory-utilization", "--num-gpu-blocks-override"} & self._given():
            memory = str(_quarter_of_memory())
            words += self._defaults({"--kv-cache-memory-bytes": memory}) if on_cpu() else []
        if self.config is not None:
            options = json.dumps({OPTIONS_KEY: self.config.to_dict()})
            words += ["--attention-backend", "CUSTOM", "--additional-config", options]
        return [*words, *self.flags]

    def environment(self) -> dict[str, str]:
        """The environment of the child process."""
        own = dict(os.environ)
        if self.api_key:
            own["VLLM_API_KEY"] = self.api_key  # not on the command line, where others read it
        if on_cpu():
            cores = share_cores(sorted(_cores()), self.num_workers)
            own.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
            if "OMP_WAIT_POLICY" not in own:
                own.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
        return own

    @property
    def num_workers(self) -> int:
        """Worker processes on this host."""
        ranks = self._number("--tensor-parallel-size", "-tp")
        ranks *= self._number("--pipeline-parallel-size", "-pp")
        replicas = self._number("--data-parallel-size", "-dp")
        replicas = self._number("--data-parallel-size-local", "-dpl", otherwise=replicas)
        return max(ranks // self._number("--nnodes", "-n"), 1) * replicas

    @property
    def url(self) -> str:
        """Where this machine reaches the server."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        scheme = "https" if "--ssl-certfile" in self._given() else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def answers(self) -> bool:
        """It opens an address; the other hosts of a multi-node server do not."""
        return "--headless" not in self._given()

    def _given(self) -> set[str]:
        return {normal(word) for word in (*self.flags, *self.file_flags) if word.startswith("-")}

    def _defaults(self, flags: Mapping[str, str]) -> list[str]:
        given = self._given()
        return [
            word for flag, value in flags.items() if flag not in given for word in (flag, value)
        ]

    def _number(self, *names: str, otherwise: int = 1) -> int:
        for flag, value in itertools.pairwise((*self.flags, *self.file_flags, "")):
            if normal(flag) in names:
                text = flag.partition("=")[2] or value
                return int(text) if text.isdigit() else otherwise
        return otherwise


def is_loopback(host: str) -> bool:
    """Only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_access(host: str, api_key: str | None, allow_unauthenticated: bool) -> None:
    """Refuses an address that others reach and nothing guards.

    Raises:
        ConfigError: naming the option.
    """
    if is_loopback(host) or api_key or allow_unauthenticated:
        return
    raise ConfigError(
        "host",
        "127.0.0.1, or an API key for an address that other machines reach",
        f"{host} without a key",
        "set --api-key or VLLM_API_KEY, or say --allow-unauthenticated",
    )


def check_port(host: str, port: int) -> None:
    """Raises ConfigError, at once instead of after a start, where somebody else listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            hint = "choose another with --port"
            raise ConfigError("port", "a free port", f"{port} ({error.strerror})", hint) from error


def quick_start(flags: Sequence[str]) -> tuple[str, ...]:
    """Flags for a model so small that compiling it takes longer than it saves."""
    compiles = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "-O")
    chosen = any(flag.startswith(compiles) for flag in map(normal, flags))
    return () if chosen else ("--enforce-eager",)


def share_cores(cores: Sequence[int], workers: int) -> str:
    """Cores of every worker, as vLLM writes them: `0,1` for one, `0|1` for two."""
    each = max(len(cores) // workers, 1)
    parts = [cores[i * each : (i + 1) * each] or cores for i in range(workers)]
    return "|".join(",".join(map(str, part)) for part in parts)


def _cores() -> set[int]:
    return os.sched_getaffinity(0)


def on_cpu() -> bool:
    """No GPU driver: the KV cache shares the memory of everything else."""
    return not Path("/proc/driver/nvidia").exists()


def _quarter_of_memory() -> int:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"MemAvailable:\s+(\d+)", text)
    return int(found[1]) * 1024 // 4 if found else 2**30


def stage_of(line: str) -> str | None:
    """What a line of vLLM's log says about the start, if anything."""
    return next((stage for mark, stage in STAGES if mark in line), None)


def complaint(lines: Iterable[str]) -> str:
    """The sentence in which a server that died said why."""
    text = [re.sub(r"^(\[\w+\]: )?(\(.*?\) )?(ERROR [\d: -]+\[.*?\] )?", "", x) for x in lines]
    errors = [x.strip() for x in text if re.match(r"\s*[\w.]*(Error|Exception)\b.*: ", x)]
    ours = [x for x in errors if x.startswith("hipserve.")]
    values = [x.strip().removeprefix("Value error, ") for x in text if "Value error, " in x]
    found = values or ours or errors or [x.strip() for x in text if "error:" in x]
    sentence = found[0] if found else "no reason given; see the log with --verbose"
    return re.sub(r"^[\w.]*Error: |\s*\[type=.*", "", sentence)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a running server says about itself."""

    name: str
    max_context: int
    kv_tokens: int
    bound_bytes: int


class Client:
    """Reads what the ready card shows."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._context = ssl.create_default_context()
        self._context.check_hostname = False  # only ever speaks to this machine
        self._context.verify_mode = ssl.CERT_NONE

    def healthy(self) -> bool:
        """The server answers."""
        try:
            self._read("/health")
        except (OSError, urllib.error.URLError):
            return False
        return True

    def facts(self) -> Facts:
        """Model, context and memory."""
        model: dict[str, Any] = json.loads(self._read("/v1/models"))["data"][0]
        metrics = self._read("/metrics")
        blocks = [
            int(_label(line, "num_gpu_blocks")) * int(_label(line, "block_size"))
            for line in metrics.splitlines()
            if line.startswith("vllm:cache_config_info{")
        ]
        bounds = sum(_values(metrics, "hipserve_page_bound_bytes"))
        return Facts(model["id"], model["max_model_len"], sum(blocks), int(bounds))

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        return sum(_values(self._read("/metrics"), name))

    def _read(self, path: str) -> str:
        request = urllib.request.Request(self._server.url + path)
        if self._server.api_key:
            request.add_header("Authorization", f"Bearer {self._server.api_key}")
        with urllib.request.urlopen(request, timeout=2, context=self._context) as answer:
            return answer.read().decode()


def _label(line: str, name: str) -> str:
    found = re.search(rf'\b{name}="(\d+)"', line)
    return found[1] if found else "0"


def _values(metrics: str, name: str) -> Iterator[float]:
    for line in metrics.splitlines():
        if line.startswith((name + " ", name + "{")):
            yield float(line.rsplit(" ", 1)[1])
