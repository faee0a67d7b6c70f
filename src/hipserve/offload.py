"""Where offloaded keys and values live: one frozen, validated record."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
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
        host_memory: for the keys and values of all layers: bytes, or a size such as "64GiB". GPUs
            that share a model divide it.
        device_memory: for those that a GPU holds of them, all its layers together; an eighth of its
            share of host_memory if None. Not for models on a CPU.
        file: a file to make for them, or a directory; the name is free again at once, and the
            space when the cache is gone. For models on a CPU, whose memory is then a cache of it.

    Raises:
        ConfigError: for any value out of range, naming the field.
    """

    host_memory: str | int
    device_memory: str | int | None = None
    file: str | Path | None = None

    def __post_init__(self) -> None:
        parse_bytes("host_memory", self.host_memory)
        if self.device_memory is not None:
            parse_bytes("device_memory", self.device_memory)
        if not isinstance(cast("object", self.file), str | Path | None):
            raise ConfigError("file", "a path", repr(self.file))

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return parse_bytes("host_memory", self.host_memory)

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory."""
        if self.device_memory is None:
            return self.host_bytes // 8
        return parse_bytes("device_memory", self.device_memory)

    def of_card(self, cards: int) -> Offload:
        """The same for one of so many GPUs that share a model, with its device_memory said."""
        given = self.device_memory
        return replace(self, device_memory=self.device_bytes // cards if given is None else given)

    def to_dict(self) -> dict[str, str | int]:
        """Plain values, as JSON holds them."""
        given = {"host_memory": self.host_memory, "device_memory": self.device_memory}
        given["file"] = None if self.file is None else str(self.file)
        return {name: value for name, value in given.items() if value is not None}


TILE_SIZE = 16
"""Keys of one KV head that travel together, with their values."""

FEW_PAGES = 2
"""Pages of a sequence that a step may write without staging all that it has."""


STAGED_LAYERS = 2
"""Layers whose pages are on the device while a text is read: the one that computes, and the next or
the one before."""


def page_bytes(heads: int, page_size: int, head_dim: int, itemsize: int) -> int:
    """Keys and values of one page, in host memory or staged on the device."""
    return 2 * heads * page_size * head_dim * itemsize


def slot_bytes(heads: int, head_dim: int, itemsize: int) -> int:
    """One tile of every head on the device: keys, values, owner, stamp and load."""
    return heads * (2 * TILE_SIZE * head_dim * itemsize + 16)


def table_bytes(heads: int, page_size: int) -> int:
    """What says where the tiles of one page are, and whether the page is on the device."""
    return 4 * (heads * page_size // TILE_SIZE + 2)


def tiles_of_rows(
    num_sink_tokens: int, budget: int, window: int, granularity: int, rows: int = 1
) -> int:
    """Maximum number of tiles that a pruned query block reads of one head.

    rows: of the query block; of a single row, the steps that use its selection again.
    """
    recent = window + granularity + rows - 2
    return -(-num_sink_tokens // TILE_SIZE) - (-budget // TILE_SIZE) - (-recent // TILE_SIZE)
