"""GPUs by name: memory, bandwidth and link, as their makers' datasheets state them."""

from __future__ import annotations

import re
from typing import NamedTuple

from hipserve.errors import ArgumentError, did_you_mean

PCIE = {3: 16e9, 4: 32e9, 5: 64e9}
"""Bytes per second of 16 lanes each way, by generation, as datasheets state them (in both
directions: twice as much). One large copy reaches some 85 % of it (docs/gpu.md)."""

UTILIZATION = 0.92
"""vLLM's `--gpu-memory-utilization` unless it is given."""

CHUNK, LARGE_CHUNK = 2048, 8192
"""Tokens that vLLM's server reads in a step (`--max-num-batched-tokens`) on CPUs and small cards,
and on large cards."""

LARGE_MEMORY = 70 * 2**30
"""Bytes of a large card."""


class Card(NamedTuple):
    """A GPU.

    Attributes:
        title: its name and where the numbers are from.
        memory: bytes.
        bandwidth: of its memory, bytes per second.
        pcie: generation of its link to the host, 16 lanes.
    """

    title: str
    memory: float
    bandwidth: float
    pcie: int

    @property
    def link(self) -> float:
        """Bytes per second from the host."""
        return PCIE[self.pcie]


def chunk_of_card(name: str, memory: float) -> int:
    """Tokens that vLLM's server reads in a step on a GPU of this name with so many bytes."""
    return LARGE_CHUNK if memory >= LARGE_MEMORY and "A100" not in name else CHUNK


CARDS = {
    "b200-180g": Card("NVIDIA B200 (DGX B200 datasheet)", 180e9, 8.0e12, 5),
    "h200-141g": Card("NVIDIA H200 SXM (H200 datasheet)", 141e9, 4.8e12, 5),
    "h100-80g": Card("NVIDIA H100 SXM (H100 datasheet)", 80e9, 3.35e12, 5),
    "h100-pcie-80g": Card("NVIDIA H100 PCIe (H100 PCIe datasheet)", 80e9, 2.0e12, 5),
    "h100-nvl-94g": Card("NVIDIA H100 NVL (H100 datasheet)", 94e9, 3.9e12, 5),
    "a100-80g": Card("NVIDIA A100 SXM (A100 datasheet)", 80e9, 2.039e12, 4),
    "a100-40g": Card("NVIDIA A100 SXM (A100 datasheet)", 40e9, 1.555e12, 4),
    "l40s-48g": Card("NVIDIA L40S (L40S datasheet)", 48e9, 864e9, 4),
    "l4-24g": Card("NVIDIA L4 (L4 datasheet)", 24e9, 300e9, 4),
    "a10-24g": Card("NVIDIA A10 (A10 datasheet)", 24e9, 600e9, 4),
    "rtx-pro-6000-96g": Card("NVIDIA RTX PRO 6000 (its datasheet)", 96e9, 1.792e12, 5),
    "rtx6000-ada-48g": Card("NVIDIA RTX 6000 Ada (its datasheet)", 48e9, 960e9, 4),
    "rtx5090-32g": Card(
        "NVIDIA GeForce RTX 5090 (Blackwell architecture paper)", 32e9, 1.792e12, 5
    ),
    "rtx4090-24g": Card("NVIDIA GeForce RTX 4090 (Ada architecture paper)", 24e9, 1.008e12, 4),
    "rtx3090-24g": Card("NVIDIA GeForce RTX 3090 (Ampere GA102 paper)", 24e9, 936e9, 4),
}


def find_card(name: str) -> Card:
    """The card of that name; of a name without memory, such as `h200`, the only one.

    Raises:
        ArgumentError: none, or several.
    """
    known = [key for key in CARDS if key.rpartition("-")[0] == name]
    if name in CARDS or len(known) == 1:
        return CARDS[name if name in CARDS else known[0]]
    near = did_you_mean(name, [*CARDS, *(key.rpartition("-")[0] for key in CARDS)])
    hint = near or "--device-memory plans for a card that is not listed"
    raise ArgumentError("gpu", f"one of {', '.join(CARDS)}", repr(name), hint)


def recognise(name: str, memory: int) -> Card | None:
    """The card that a driver calls `name`, such as `NVIDIA A100-SXM4-80GB`; None for others."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    close = {key: card for key, card in CARDS.items() if abs(memory / card.memory - 1) < 0.15}
    stems = {key.rpartition("-")[0].replace("-", ""): card for key, card in close.items()}
    found = [stem for stem in stems if stem in letters]
    return stems[max(found, key=len)] if found else None
