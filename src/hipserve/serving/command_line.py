"""What to serve and where, as the command line and the environment of vLLM's OpenAI server."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hipserve.config import HiPConfig
from hipserve.host import HostMemory
from hipserve.integrations.vllm import OPTIONS_KEY
from hipserve.offload import Offload
from hipserve.serving.environment import kv_memory, make_environment, on_cpu

COMMAND = "hipserve.integrations.vllm.command"
DRAIN_SECONDS = 30
"""Seconds that a server has for running requests once it is asked to stop."""


class HostedBlocks(NamedTuple):
    """KV blocks that hold an index only.

    Attributes:
        number: of blocks.
        index_bytes: of all of them, in one worker.
    """

    number: int
    index_bytes: int


@dataclass(frozen=True, slots=True)
class Server:
    """What to serve and where.

    Attributes:
        model: a directory or a hub name.
        name: what clients call it.
        config: HiP attention's settings; None serves with vLLM's own dense attention.
        host, port: the address.
        api_key: what clients have to send; None accepts all clients.
        flags: vLLM's own flags, passed on as they are.
        file_flags: those that vLLM reads from its own file of flags.
        offload: where keys and values live, if not in KV blocks.
        hosted: the KV blocks whose keys and values live there.
    """

    model: str
    name: str
    config: HiPConfig | None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    flags: tuple[str, ...] = field(default=())
    file_flags: tuple[str, ...] = field(default=())
    offload: Offload | None = None
    hosted: HostedBlocks | None = None

    def command(self) -> list[str]:
        """The command line of the child process."""
        words = [sys.executable, "-m", COMMAND, "serve", self.model]
        words += ["--host", self.host, "--port", str(self.port)]
        words += self._defaults({"--served-model-name": self.name})
        words += self._defaults({"--shutdown-timeout": str(DRAIN_SECONDS)})
        memory = kv_memory(self.option, HostMemory.read()) if on_cpu() else None
        if self.hosted is not None:
            words += self._defaults({"--num-gpu-blocks-override": str(self.hosted.number)})
            memory = memory and self.hosted.index_bytes
        words += self._defaults({"--kv-cache-memory-bytes": str(memory)}) if memory else []
        if self.config is not None:
            table = self.config.to_dict()
            if self.offload is not None:
                table["offload"] = self.offload.to_dict()
            options = json.dumps({OPTIONS_KEY: table})
            words += ["--attention-backend", "CUSTOM", "--additional-config", options]
        return [*words, *self.flags]

    def environment(self) -> dict[str, str]:
        """The environment of the child process."""
        return make_environment(self.api_key, self.num_workers)

    @property
    def num_workers(self) -> int:
        """Worker processes on this host."""
        copies = self._number("--data-parallel-size-local", "-dpl", otherwise=self.copies)
        return max(self.cards * self.stages // self.machines, 1) * copies

    @property
    def cards(self) -> int:
        """Workers that share each layer (tensor parallelism)."""
        return self._number("--tensor-parallel-size", "-tp")

    @property
    def stages(self) -> int:
        """Parts of the layers, each with workers of its own (pipeline parallelism)."""
        return self._number("--pipeline-parallel-size", "-pp")

    @property
    def copies(self) -> int:
        """Engines with all of the model (data parallelism)."""
        return self._number("--data-parallel-size", "-dp")

    @property
    def machines(self) -> int:
        """Hosts of each engine."""
        return self._number("--nnodes", "-n")

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

    def option(self, *names: str) -> str | None:
        """The value of the first of these flags that is given; None for none."""
        for flag, value in itertools.pairwise((*self.flags, *self.file_flags, "")):
            if normal(flag) in names:
                return flag.partition("=")[2] or value
        return None

    def _number(self, *names: str, otherwise: int = 1) -> int:
        text = self.option(*names) or ""
        return int(text) if text.isdigit() else otherwise


def normal(flag: str) -> str:
    """`--some_flag.key=3` as `--some-flag`: vLLM takes all of these."""
    return flag.partition("=")[0].partition(".")[0].replace("_", "-")


def quick_start(flags: Sequence[str]) -> tuple[str, ...]:
    """Flags for a model so small that compiling it takes longer than it saves."""
    compiles = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "-O")
    chosen = any(flag.startswith(compiles) for flag in map(normal, flags))
    return () if chosen else ("--enforce-eager",)


def short_answers(flags: Sequence[str]) -> tuple[str, ...]:
    """Flags for a model that seldom ends its turn: requests that do not say how to sample get the
    likeliest tokens, and not as many as the context holds."""
    names = ("--override-generation-config", "--generation-config")
    if any(normal(flag) in names for flag in flags):
        return ()
    return (names[0], json.dumps({"temperature": 0, "max_new_tokens": 256}))
