"""Where offloaded keys and values live: one frozen, validated record."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hipserve.errors import ConfigError

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{name}I": 1024**i for i, name in enumerate("KMGT", start=1)
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?|)B?", re.IGNORECASE)


def parse_bytes(name: str, value: object) -> int:
    """Bytes of a size as people write it: "64GiB", "1.5 GB", or a whole number.

    Raises:
        ConfigError: the value of the field `name` is no size above 0.
    """
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    size = 0
    if found:
        size = int(float(found[1]) * _FACTORS[found[2].upper()])
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if size <= 0:
        raise ConfigError(name, 'a size such as "64GiB", or bytes', repr(value))
    return size


def format_bytes(size: int) -> str:
    """A size as people read it, such as 1.5 GiB."""
    for factor, unit in ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size} bytes"


@dataclass(frozen=True, slots=True)
class Offload:
    """Keys and values in host memory or in a file; the index stays where the model is.

    >>> Offload(host_memory="2 GiB", file="/nvme/kv").host_bytes
    2147483648

    Attributes:
        host_memory: for the keys and values of all layers: bytes, or a size such as "64GiB".
        file: a file to make for them, or a directory; the name is free again at once, and the
            space when the cache is gone. For models on a CPU, whose memory is then a cache of it.

    Raises:
        ConfigError: for any value out of range, naming the field.
    """

    host_memory: str | int
    file: str | Path | None = None

    def __post_init__(self) -> None:
        parse_bytes("host_memory", self.host_memory)
        if not isinstance(cast("object", self.file), str | Path | None):
            raise ConfigError("file", "a path", repr(self.file))

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return parse_bytes("host_memory", self.host_memory)
