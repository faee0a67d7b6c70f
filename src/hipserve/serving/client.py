"""Asks a running server how it is: health, model, context, memory, metrics."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from hipserve.serving.command_line import Server
from hipserve.serving.metrics import kv_tokens, samples


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
        bounds = sum(samples(metrics, "hipserve_page_bound_bytes"))
        return Facts(model["id"], model["max_model_len"], kv_tokens(metrics), int(bounds))

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        return sum(samples(self._read("/metrics"), name))

    def _read(self, path: str) -> str:
        request = urllib.request.Request(self._server.url + path)
        if self._server.api_key:
            request.add_header("Authorization", f"Bearer {self._server.api_key}")
        with urllib.request.urlopen(request, timeout=2, context=self._context) as answer:
            return answer.read().decode()
