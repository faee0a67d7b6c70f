"""Threads while other programs run: with files of a kernel that tells of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from hipserve.models import Conversation, load
from hipserve.models.cores import (
    INTERVAL,
    FreeCores,
    Look,
    busy_seconds,
    keep_to_free_cores,
)

HERTZ = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of four threads on the cores 0 to 3."""
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def write(path: Path, *seconds: float) -> Path:
    """/proc/stat of a machine whose cores have worked so long: user, nice, system, idle, iowait,
    irq, softirq, steal, guest and guest_nice."""
    path.write_text(
        "cpu  1 2 3\n"
        + "".join(
            f"cpu{i} {round(x * HERTZ)} 0 0 99999 777 0 0 0 555 0\n" for i, x in enumerate(seconds)
        )
        + "\nintr 7\n"
    )
    return path


def test_only_work_on_own_cores_counts(tmp_path: Path) -> None:
    stat = write(tmp_path / "stat", 10, 20, 40)
    assert busy_seconds(stat, {0, 2}) == 50
    assert busy_seconds(tmp_path / "none", {0}) == 0
    stat.write_text(f"cpu7 {HERTZ} {HERTZ} {HERTZ} 5 5 {HERTZ} {HERTZ} {HERTZ} 9 9\n")
    assert busy_seconds(stat, {7}) == 6


@pytest.mark.parametrize(
    ("taken", "left"), [((0, 0, 0, 0), 4), ((1, 0.2, 0, 0.1), 3), ((1, 1, 1, 0), 1), ((2,) * 4, 1)]
)
@pytest.mark.usefixtures("threads")
def test_other_programs_keep_the_cores_that_they_use(
    taken: tuple[float, ...], left: int, tmp_path: Path
) -> None:
    stat = write(tmp_path / "stat", 0, 0, 0, 0, 50)
    since = Look(time.perf_counter() - 100, Look.now(stat).others)
    write(stat, *(100 * x for x in taken), 5000)  # on another core, which is not ours
    cores = FreeCores(since, stat)
    with cores:
        assert torch.get_num_threads() == left
    write(stat, *([1e6] * 4))  # too soon to look again
    with cores:
        assert torch.get_num_threads() == left
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("threads")
def test_threads_come_back_when_the_others_are_gone(tmp_path: Path) -> None:
    stat = write(tmp_path / "stat", 0, 0, 0, 0)
    since = Look(time.perf_counter() - 100, Look.now(stat).others)
    with (cores := FreeCores(since, write(stat, 300, 0, 0, 0))):
        assert torch.get_num_threads() == 1
    time.sleep(INTERVAL)
    with cores:
        assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("threads")
def test_a_kernel_without_the_file_changes_nothing(tmp_path: Path) -> None:
    with FreeCores(Look(0, 0), tmp_path / "none"):
        assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("threads")
def test_a_model_that_fails_gives_the_threads_back(tmp_path: Path) -> None:
    stat = write(tmp_path / "stat", 0, 0, 0, 0)
    since = Look(time.perf_counter() - 100, Look.now(stat).others)
    write(stat, 300, 300, 0, 0)
    seen: list[int] = []

    class Model(nn.Module):
        def forward(self, fails: bool) -> None:
            seen.append(torch.get_num_threads())
            if fails:
                raise ValueError("no")

    model = Model()
    keep_to_free_cores(model, since, stat)
    model(False)
    with pytest.raises(ValueError, match="no"):
        model(True)
    assert (seen, torch.get_num_threads()) == ([1, 1], 4)


def test_every_call_of_a_loaded_model_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[FreeCores] = []
    monkeypatch.setattr(FreeCores, "__enter__", lambda self: looks.append(self))
    talk = Conversation(load())
    talk.ask("Say yes.", max_new_tokens=4)
    assert talk.statistics is not None
    assert len(looks) >= 1 + talk.statistics.new_tokens
