"""As many threads as cores are free, looked at again and again while a model computes on CPUs.

OpenMP's threads wait for each other some hundred times a token. Where another program has one of
their cores, all of them wait for its turns: a single thread is several times as fast.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

INTERVAL = 0.5
"""Seconds between two looks: the kernel counts processor time in hundredths."""

STAT = Path("/proc/stat")


class Look(NamedTuple):
    """Seconds.

    Attributes:
        at: when it was.
        others: processor time of other programs until then, on the cores of this one.
    """

    at: float
    others: float

    @classmethod
    def now(cls, stat: Path = STAT) -> Look:
        others = busy_seconds(stat, _cores()) - time.process_time()
        return cls(time.perf_counter(), others)


class FreeCores:
    """Sets torch's threads within a `with` block; at its end they are as many as before.

    Args:
        active: False does nothing, as for a model on a GPU.
        since: the first look.
        stat: the kernel's file.
    """

    def __init__(self, active: bool, since: Look, stat: Path = STAT) -> None:
        self._last, self._stat = since, stat
        self._active = active and stat.exists()
        self._most = torch.get_num_threads()

    def __enter__(self) -> None:
        self._most = torch.get_num_threads()
        self.look()

    def __exit__(self, *_: object) -> None:
        if self._active:
            torch.set_num_threads(self._most)

    def look(self) -> None:
        """Leaves other programs the cores that they kept busy since the last look, if that is a
        while ago."""
        if not self._active or time.perf_counter() - self._last.at < INTERVAL:
            return
        look = Look.now(self._stat)
        taken = (look.others - self._last.others) / (look.at - self._last.at)
        torch.set_num_threads(min(max(round(len(_cores()) - taken), 1), self._most))
        self._last = look


def busy_seconds(stat: Path, cores: set[int]) -> float:
    """Seconds that cores have worked since the machine started; 0 where the kernel has no such
    file."""
    if not stat.exists():
        return 0.0
    names = {f"cpu{core}" for core in cores}
    rows = [line.split() for line in stat.read_text("utf-8").splitlines()]
    ticks = sum(  # all but idle, iowait, and guests, which count as users already
        sum(map(int, (*row[1:4], *row[6:9]))) for row in rows if row and row[0] in names
    )
    return ticks / os.sysconf("SC_CLK_TCK")


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


START = Look.now()
"""When this module was loaded, before a model was."""
