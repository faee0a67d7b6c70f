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
from torch import nn

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
        since: the first look.
        stat: the kernel's file.
    """

    def __init__(self, since: Look, stat: Path = STAT) -> None:
        self._last, self._stat = since, stat
        self._before = torch.get_num_threads()
        self._free = len(_cores())

    def __enter__(self) -> None:
        """Leaves other programs the cores that they kept busy since the last look, or before it,
        if that is not a while ago."""
        self._before = torch.get_num_threads()
        if time.perf_counter() - self._last.at >= INTERVAL and self._stat.exists():
            look = Look.now(self._stat)
            taken = (look.others - self._last.others) / (look.at - self._last.at)
            self._free = max(round(len(_cores()) - taken), 1)
            self._last = look
        self._set(min(self._free, self._before))

    def __exit__(self, *_: object) -> None:
        self._set(self._before)

    @staticmethod
    def _set(threads: int) -> None:
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)


def keep_to_free_cores(model: nn.Module, since: Look | None = None, stat: Path = STAT) -> None:
    """Makes every call of a model on CPUs take as many threads as cores are free.

    since: the first look; the start of this module if None.
    """
    cores = FreeCores(since or START, stat)

    def before(*_: object) -> None:
        cores.__enter__()

    def after(*_: object) -> None:
        cores.__exit__()

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after, always_call=True)


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
