"""`hipserve serve`: vLLM's OpenAI-compatible server with HiP attention."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Annotated

import typer
from rich.status import Status

from hipserve.cli import options
from hipserve.cli.numbers import format_bytes
from hipserve.cli.output import err, result
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, HipserveError
from hipserve.integrations.vllm import flags as vllm_flags
from hipserve.integrations.vllm import server as vllm_server
from hipserve.integrations.vllm.command import find_version
from hipserve.integrations.vllm.server import Client, Facts, Server
from hipserve.models.bundled import BUNDLED, bundled_path
from hipserve.models.gguf_files import find_gguf

SILENCE = 2.0
"""Seconds without a word that a start may last."""

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VLLM_API_KEY", help="What clients must send as their API key."),
    ] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option(help="Let other machines in without a key.")
    ] = False,
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    dense: Annotated[bool, typer.Option("--dense", help="vLLM's own dense attention.")] = False,
    verbose: Annotated[bool, typer.Option(help="Show vLLM's log while it starts.")] = False,
) -> None:
    """Serves [MODEL], the bundled one if left out, through vLLM; all its other flags work, too."""
    words = context.args
    named = bool(words) and not words[0].startswith("-")
    flags, held = tuple(words[1:] if named else words), tuple[str, ...]()
    model = words[0] if named else BUNDLED
    find_version()
    if config is not None and vllm_flags.is_engine_file(config):
        flags, held = ("--config", str(config), *flags), vllm_flags.read_engine_file(config)
        config = None
    check(model, (*flags, *held))
    vllm_server.check_access(host, api_key, allow_unauthenticated)
    vllm_server.check_port(host, port)
    if dense:
        options.refuse_beside_dense(config, preset, budget, selector)
    settings = None if dense else options.make_config(config, preset, budget, selector)
    path = model
    if model == BUNDLED:
        path, flags = str(bundled_path()), (*vllm_server.quick_start(flags), *flags)
    run(Server(path, model, settings, host, port, api_key, flags, held), verbose)


def check(model: str, flags: tuple[str, ...]) -> None:
    """Refuses, before anything starts, a path that leads nowhere and flags that cannot be meant."""
    _refuse_gguf(model)
    vllm_flags.check_model(model)
    vllm_flags.check_flags(flags)
    vllm_flags.check_known(flags)


def _refuse_gguf(model: str) -> None:
    if model != BUNDLED and find_gguf(model):
        hint = "hipserve run, chat and eval read GGUF; serve the model's safetensors checkpoint"
        raise ArgumentError("model", "a directory or hub name, as vLLM reads no GGUF", model, hint)


def run(server: Server, verbose: bool = False) -> None:
    """Starts the server, says what it is doing, shows the ready card, and waits for its end.

    Raises:
        BackendError: the server died before it was ready; the message says why.
    """
    child = Child(server)
    log = Log(child.process)
    try:
        if server.answers:
            _wait_until_ready(server, child, log, verbose)
        log.follow()
    finally:
        code = child.stop()
    if code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise HipserveError(f"the server ended by itself ({how}); its last words are above")


class Child:
    """The server's process and all that it starts: they end with this one."""

    def __init__(self, server: Server) -> None:
        self.process = subprocess.Popen(
            server.command(),
            env=server.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.ready = self.stopping = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        """The first signal lets requests end, within the server's time; the second does not."""
        if self.stopping or not self.ready:
            self._signal(signal.SIGKILL)
        self.stopping = True
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            elif self.process.poll() is None:
                self.process.send_signal(number)

    def stop(self) -> int:
        """Ends the server if it runs, and what is left of its processes; its exit code."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(vllm_server.DRAIN_SECONDS + 15)
        self._signal(signal.SIGKILL)
        code = self.process.wait()
        return 0 if self.stopping else code


class Log:
    """The lines that a server writes, read as they come."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.last: deque[str] = deque(maxlen=400)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(child,), daemon=True).start()

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def next(self, timeout: float) -> str | None:
        """The next line; None if none came in time, or no more will."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)
        else:
            self.last.append(line)
        return line

    def follow(self) -> None:
        """Hands lines on to stderr until there are no more."""
        while (line := self._lines.get()) is not None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def _wait_until_ready(server: Server, child: Child, log: Log, verbose: bool) -> None:
    client, teller = Client(server), Teller(server.name)
    with teller:
        while child.process.poll() is None and not client.healthy():
            line = log.next(timeout=0.2)
            while line is not None:
                if verbose:
                    err.print(line, markup=False, highlight=False, soft_wrap=True)
                teller.tell(vllm_server.stage_of(line))
                line = log.next(timeout=0)
            teller.tell(None)
    if child.process.poll() is None:
        child.ready = True
        result(card(server, client.facts(), teller.seconds))
    elif not child.stopping:
        while log.next(timeout=0.5) is not None:
            pass
        sentence = vllm_server.complaint(log.last)
        raise vllm_flags.refusal(sentence, log.last, vllm_server.on_cpu())


class Teller:
    """Says what a start is busy with, and how long it has been."""

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
        """A new stage; or None, that the last one goes on."""
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


def card(server: Server, facts: Facts, seconds: float) -> str:
    """What a user wants to know about a server that has just come up."""
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if server.api_key else ""
    question = {"role": "user", "content": "The pass key is 83724. What is the pass key?"}
    body = json.dumps({"model": facts.name, "messages": [question]})
    curl = f"curl {server.url}/v1/chat/completions{key} -H 'Content-Type: application/json'"
    lines = {
        "ready": f"after {seconds:.0f} s",
        "address": f"{server.url}/v1, model {facts.name}",
        "context": f"{facts.max_context:,} tokens, prompt and answer together",
        "attention": describe(server.config, facts.max_context),
        "KV cache": f"{facts.kv_tokens:,} tokens",
        "page bounds": f"{format_bytes(facts.bound_bytes)}, inside the KV cache",
        "metrics": f"{server.url}/metrics",
        "try": f"{curl} -d '{body}'",
    }
    return "".join(f"{name:<13}{value}\n" for name, value in lines.items())


def describe(config: HiPConfig | None, max_context: int) -> str:
    """The budget, and its share of the longest context."""
    if config is None:
        return "dense (vLLM's own)"
    read = config.budget + config.num_sink_tokens + config.sliding_window
    return (
        f"HiP, {config.budget:,} keys a query block beside {config.num_sink_tokens} sinks and a "
        f"window of {config.sliding_window}: {min(read / max_context, 1):.1%} of the full context"
    )
