"""How long something took, by the clock on the wall and by the processor's."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from hipserve.lab.shown import Grid


@dataclass(slots=True)
class Seconds:
    """What a block took.

    Attributes:
        wall: seconds that passed.
        processor: seconds that all threads of this process computed together. On a CPU that others
            use too, this divided by the threads is what the part would take by itself.
    """

    wall: float = 0.0
    processor: float = 0.0

    def __str__(self) -> str:
        return f"{self.wall:,.1f} s ({self.processor:,.1f} s of processor time)"


@contextmanager
def measured() -> Generator[Seconds]:
    """The seconds of a block, known at its end."""
    wall, processor, found = time.perf_counter(), time.process_time(), Seconds()
    yield found
    found.wall = time.perf_counter() - wall
    found.processor = time.process_time() - processor


def grid(seconds: dict[str, Seconds], machine: str) -> Grid:
    """A row for each part, and one for all."""
    total = Seconds(
        sum(part.wall for part in seconds.values()),
        sum(part.processor for part in seconds.values()),
    )
    rows = [
        [name, f"{part.wall:,.1f}", f"{part.processor:,.1f}"]
        for name, part in {**seconds, "all": total}.items()
    ]
    return Grid("Seconds of each part", ["part", "seconds", "of processor time"], rows, machine)
