"""Memory of this machine, its limits and its links, as the kernel shows them; no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
NVIDIA = "0x10de"
LANE_BYTES = {1: 0.25e9, 2: 0.5e9, 3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9}
"""Bytes per second of one lane each way, by PCIe generation, rounded as datasheets do."""

TRANSFERS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
"""GT/s of a lane, as sysfs shows them, by PCIe generation."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of memory.

    Attributes:
        total: of the machine.
        available: what programs may still take without swapping, in the container's limit.
        container: the limit of this process's container or control group; None for none.
    """

    total: int
    available: int
    container: int | None = None

    @classmethod
    def read(cls, root: Path = ROOT) -> HostMemory | None:
        """The memory of this machine; None where the kernel does not say.

        root: where /proc and /sys are.
        """
        info = _text(root / "proc/meminfo")
        found = dict(re.findall(r"(\w+):\s+(\d+) kB", info))
        if not {"MemTotal", "MemAvailable"} <= found.keys():
            return None
        total, available = (int(found[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
        limits = [limit for limit in _limits(root) if limit[0] < total]
        if not limits:
            return cls(total, available)
        room = min(max(limit - used, 0) for limit, used in limits)
        return cls(total, min(available, room), min(limit for limit, _ in limits))


def _limits(root: Path) -> list[tuple[int, int]]:
    """Limit and use of every control group that this process is in, without what the kernel would
    give back."""
    found: list[tuple[int, int]] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, use = names if controllers else ("memory.max", "memory.current")
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            most, used = _text(folder / limit).strip(), _text(folder / use).strip()
            if most.isdigit():
                found.append((int(most), int(used or 0) - _reclaimable(folder)))
            if folder == top:
                break
    return found


def _reclaimable(group: Path) -> int:
    """Bytes of files that nobody has used lately."""
    stat = _text(group / "memory.stat")
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.M)
    return int(found[1]) if found else 0


def locked_memory(root: Path = ROOT) -> int | None:
    """Bytes that this process may pin (`ulimit -l`); None for no limit, or where it is unknown."""
    limits = _text(root / "proc/self/limits")
    found = re.search(r"^Max locked memory\s+(\d+)", limits, re.M)
    return int(found[1]) if found else None


def numa_nodes(root: Path = ROOT) -> int:
    """Nodes of memory; 1 where the kernel does not say."""
    return len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) or 1


@dataclass(frozen=True, slots=True)
class Link:
    """How a GPU is connected.

    Attributes:
        address: on the bus.
        generation, width: of its PCIe link at its best; an idle one may run slower.
        node: the NUMA node next to it; None where there is only one.
    """

    address: str
    generation: int
    width: int
    node: int | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes per second each way."""
        return LANE_BYTES.get(self.generation, 0) * self.width


def gpu_links(root: Path = ROOT) -> list[Link]:
    """The links of NVIDIA's GPUs that can be read."""
    links: list[Link] = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        display = _text(device / "class").startswith("0x03")
        if not display or _text(device / "vendor").strip() != NVIDIA:
            continue
        speed = _text(device / "max_link_speed").split(" ")[0]
        width = _text(device / "max_link_width").strip()
        node = _text(device / "numa_node").strip()
        if speed in TRANSFERS and width.isdigit():
            near = int(node) if node.isdigit() else None
            links.append(Link(device.name, TRANSFERS[speed], int(width), near))
    return links


@dataclass(frozen=True, slots=True)
class InstalledGpu:
    """A GPU of this machine: its name, and bytes of its memory."""

    name: str
    memory: int


def installed_gpu() -> InstalledGpu | None:
    """The first GPU that nvidia-smi shows; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    name, _, mebibytes = (done.stdout.splitlines() or [""])[0].rpartition(", ")
    return InstalledGpu(name, int(mebibytes) << 20) if mebibytes.isdigit() else None


def _text(path: Path) -> str:
    """What a file of the kernel says; nothing where it is missing."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
