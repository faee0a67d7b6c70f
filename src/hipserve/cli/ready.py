"""What `hipserve serve` shows: the progress of the start, then the ready card."""

from __future__ import annotations

import json
import time

from rich.status import Status

from hipserve.capacity.memory import index_per_token
from hipserve.capacity.shape import ModelShape
from hipserve.cli.numbers import format_bytes
from hipserve.cli.output import err
from hipserve.config import HiPConfig
from hipserve.lab.quality.tasks import PASS_KEY_QUESTION, pass_key
from hipserve.serving.client import Facts
from hipserve.serving.command_line import Server

QUESTION = {"role": "user", "content": f"{pass_key('83724')}\n\n{PASS_KEY_QUESTION}"}
SILENCE = 2.0
"""Maximum seconds without output during a start."""


class Teller:
    """Shows what a start does, and for how long."""

    def __init__(self, name: str) -> None:
        self._stage = f"starting vLLM for {name}"
        self._began = self._told = time.monotonic()
        self._status: Status | None = err.status("") if err.is_terminal else None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def __enter__(self) -> Teller:
        if self._status:
            self._status.start()
        self._say()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def tell(self, stage: str | None) -> None:
        """A new stage; None while the last one goes on."""
        changed = stage is not None and stage != self._stage
        self._stage = stage or self._stage
        if changed or self._status or time.monotonic() - self._told >= SILENCE - 0.5:
            self._say()

    def _say(self) -> None:
        text = f"{self._stage} … {self.seconds:.0f} s"
        self._told = time.monotonic()
        if self._status:
            self._status.update(text)
        else:
            err.print(text, highlight=False)


def card(server: Server, facts: Facts, seconds: float, shape: ModelShape | None = None) -> str:
    """What a user wants to know about a server that is ready."""
    cache = server.option("--kv-cache-dtype")
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if server.api_key else ""
    body = json.dumps({"model": facts.name, "messages": [QUESTION], "max_tokens": 32})
    curl = f"curl {server.url}/v1/chat/completions{key} -H 'Content-Type: application/json'"
    lines = {
        "ready": f"after {seconds:.0f} s",
        "address": f"{server.url}/v1, model {facts.name}",
        "context": f"{facts.max_context:,} tokens, prompt and answer together",
        "attention": describe(server.config, facts.max_context),
        "KV cache": f"{facts.kv_tokens:,} tokens{f' in {cache}' if cache else ''}",
        "index": describe_index(server.config, facts, shape),
        "metrics": f"{server.url}/metrics",
        "try": f"{curl} -d '{body}'",
    }
    if server.offload is not None and server.offload.file is None:
        lines["pool"] = describe_pool(server)
    return "".join(f"{name:<13}{value}\n" for name, value in lines.items())


def describe_pool(server: Server) -> str:
    """Keys and values on the host, which all GPUs divide, and the tiles that each of them has."""
    assert server.offload is not None
    cards = server.cards * server.stages
    tiles = format_bytes(server.offload.of_card(cards).device_bytes)
    each = f"each of {cards} GPUs" if cards > 1 else "the GPU"
    return f"{format_bytes(server.offload.host_bytes)} in host memory, {tiles} of tiles on {each}"


def describe_index(config: HiPConfig | None, facts: Facts, shape: ModelShape | None) -> str:
    """Its memory, and what a token takes of it, compared with its keys and values."""
    if config is None:
        return "none"
    text = f"{format_bytes(facts.bound_bytes)}, inside the KV cache"
    return f"{text}: {index_per_token(config, shape)}" if shape and shape.full_layers else text


def describe(config: HiPConfig | None, max_context: int) -> str:
    """The budget, and its share of the longest context."""
    if config is None:
        return "dense (vLLM's own)"
    read = config.budget + config.num_sink_tokens + config.sliding_window
    return (
        f"HiP, {config.budget:,} keys a query block, {config.num_sink_tokens} sinks and a "
        f"window of {config.sliding_window}: {min(read / max_context, 1):.1%} of the full context"
    )
