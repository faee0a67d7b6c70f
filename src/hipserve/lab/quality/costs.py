"""What an attention costs beside what it loses, and which of several no other beats."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import Cache

from hipserve.integrations.transformers import HiPCache
from hipserve.lab.seconds import measured


@dataclass(slots=True)
class Cost:
    """Of reading texts with one attention.

    Attributes:
        read, visible: keys that its rows read, and those that dense attention reads; without an
            account both are 0.
        seconds: of processor time on a CPU, of a clock elsewhere.
        texts: how many.
    """

    read: float = 0.0
    visible: float = 0.0
    seconds: float = 0.0
    texts: int = 0

    @property
    def share(self) -> float:
        """Of the keys that dense attention reads."""
        return self.read / self.visible if self.visible else 1.0

    @property
    def seconds_a_text(self) -> float:
        return self.seconds / max(self.texts, 1)

    @contextmanager
    def of_text(self, cache: Cache, device: torch.device) -> Generator[None]:
        """Adds what is read inside, into an empty cache."""
        with measured() as took:
            yield
        self.seconds += took.processor if device.type == "cpu" else took.wall
        self.texts += 1
        if isinstance(cache, HiPCache):
            read, visible = cache.count_keys()
            self.read += read
            self.visible += visible


def frontier(names: Sequence[str], *measures: Callable[[str], float]) -> list[str]:
    """The Pareto set: those that no other equals or beats in every measure; less is better."""
    values = {name: tuple(measure(name) for measure in measures) for name in names}
    return [
        name
        for name, own in values.items()
        if not any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for other in values.values()
        )
    ]
