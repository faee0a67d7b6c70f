"""Where a number comes from: machine, versions, commit and date."""

from __future__ import annotations

import datetime
import platform as python_platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from hipserve.platform import cpu_name, native_library


@dataclass(frozen=True, slots=True)
class Provenance:
    """What has to be known to compare a number with another."""

    cpu: str
    isa: str
    threads: int
    clock: str
    torch: str
    python: str
    hipserve: str
    commit: str
    date: str

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


def provenance(clock: str) -> Provenance:
    """The provenance of a measurement made here and now by the `clock` of `Limits`."""
    now = datetime.datetime.now(datetime.UTC)
    return Provenance(
        cpu=cpu_name().rpartition(", ")[0],
        isa=native_library().tier or "none",
        threads=torch.get_num_threads(),
        clock=clock,
        torch=torch.__version__,
        python=python_platform.python_version(),
        hipserve=version("hipserve"),
        commit=_commit(Path(__file__).parent),
        date=now.strftime("%Y-%m-%d %H:%M UTC"),
    )


def _commit(directory: Path) -> str:
    """The commit of a source checkout, with + if files differ from it; empty elsewhere."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
