"""Where a server listens: who can reach it, and whether the port is free."""

from __future__ import annotations

import ipaddress
import socket

from hipserve.errors import ConfigError


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_loopback(host: str) -> bool:
    """Only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_access(host: str, api_key: str | None, allow_unauthenticated: bool) -> None:
    """Refuses an address that other machines reach without a key.

    Raises:
        ConfigError: naming the option.
    """
    if is_loopback(host) or api_key or allow_unauthenticated:
        return
    raise ConfigError(
        "host",
        "127.0.0.1, or an API key for an address that other machines reach",
        f"{host} without a key",
        "set --api-key or VLLM_API_KEY, or pass --allow-unauthenticated",
    )


def check_port(host: str, port: int) -> None:
    """Raises ConfigError where the port is taken: at once instead of after a start."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            hint = "choose another with --port"
            raise ConfigError("port", "a free port", f"{port} ({error.strerror})", hint) from error
