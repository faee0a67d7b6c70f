"""What the kernel says of memory, its limits and its links: with files of other machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from hipserve import host
from hipserve.cli import doctor
from hipserve.host import HostMemory, Link, gpu_links, installed_gpu, locked_memory, numa_nodes

GIB = 2**30
MEMINFO = "MemTotal:       67108864 kB\nMemFree: 1 kB\nMemAvailable:   50331648 kB\n"


def write(root: Path, **files: str) -> Path:
    """Files by path; `/` is written `__` in a name."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_machine_without_limits(tmp_path: Path) -> None:
    assert HostMemory.read(tmp_path) is None
    write(tmp_path, proc__meminfo=MEMINFO)
    assert HostMemory.read(tmp_path) == HostMemory(64 * GIB, 48 * GIB)
    unlimited = {"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memory.max": "max\n"}
    assert HostMemory.read(write(tmp_path, **unlimited)) == HostMemory(64 * GIB, 48 * GIB)
    old = {
        "proc__self__cgroup": "4:memory:/\n0::/\n",
        "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{2**63 - 4096}\n",
    }
    assert HostMemory.read(write(tmp_path, **old)) == HostMemory(64 * GIB, 48 * GIB)


def test_the_smallest_group_of_a_container_counts(tmp_path: Path) -> None:
    """A pod's limit lies above its container's; files that nobody uses can go."""
    files = {
        "proc__meminfo": MEMINFO,
        "proc__self__cgroup": "0::/pod/main\n",
        "sys__fs__cgroup__pod__memory.max": f"{16 * GIB}",
        "sys__fs__cgroup__pod__memory.current": f"{15 * GIB}",
        "sys__fs__cgroup__pod__memory.stat": f"anon 1\ninactive_file {4 * GIB}\n",
        "sys__fs__cgroup__pod__main__memory.max": f"{8 * GIB}",
        "sys__fs__cgroup__pod__main__memory.current": f"{2 * GIB}",
    }
    found = HostMemory.read(write(tmp_path, **files))
    assert found == HostMemory(64 * GIB, 5 * GIB, container=8 * GIB)


def test_groups_of_the_first_version(tmp_path: Path) -> None:
    files = {
        "proc__meminfo": MEMINFO,
        "proc__self__cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/3f\n",
        "sys__fs__cgroup__memory__docker__3f__memory.limit_in_bytes": f"{4 * GIB}",
        "sys__fs__cgroup__memory__docker__3f__memory.usage_in_bytes": f"{3 * GIB}",
        "sys__fs__cgroup__memory__docker__3f__memory.stat": f"total_inactive_file {GIB}\n",
    }
    found = HostMemory.read(write(tmp_path, **files))
    assert found == HostMemory(64 * GIB, 2 * GIB, container=4 * GIB)


def test_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    """The path is the host's, and the container's own files lie at the top."""
    files = {
        "proc__meminfo": MEMINFO,
        "proc__self__cgroup": "0::/system.slice/docker-3f.scope\n",
        "sys__fs__cgroup__memory.max": f"{4 * GIB}",
        "sys__fs__cgroup__memory.current": f"{5 * GIB}",
    }
    found = HostMemory.read(write(tmp_path, **files))
    assert found == HostMemory(64 * GIB, 0, container=4 * GIB)


@pytest.mark.parametrize(("words", "expected"), [("unlimited", None), ("65536", 65536)])
def test_locked_memory(tmp_path: Path, words: str, expected: int | None) -> None:
    line = f"Max processes  1  2  processes\nMax locked memory  {words}  {words}  bytes\n"
    assert locked_memory(write(tmp_path, proc__self__limits=line)) == expected
    assert locked_memory(tmp_path / "elsewhere") is None


def test_numa_nodes(tmp_path: Path) -> None:
    assert numa_nodes(tmp_path) == 1
    for name in ("node0", "node1", "possible"):
        (tmp_path / "sys/devices/system/node" / name).mkdir(parents=True)
    assert numa_nodes(tmp_path) == 2


def device(root: Path, address: str, **files: str) -> Path:
    names = {f"sys__bus__pci__devices__{address}__{name}": x for name, x in files.items()}
    return write(root, **names)


def test_links_of_gpus(tmp_path: Path) -> None:
    gpu = {"class": "0x030200\n", "vendor": "0x10de\n"}
    fast = {"max_link_speed": "32.0 GT/s PCIe\n", "max_link_width": "16\n", "numa_node": "1\n"}
    slow = {"max_link_speed": "16.0 GT/s PCIe\n", "max_link_width": "8\n", "numa_node": "-1\n"}
    device(tmp_path, "0000:19:00.0", **gpu, **fast)
    device(tmp_path, "0000:1a:00.0", **gpu, **slow)
    device(tmp_path, "0000:1b:00.0", **gpu, max_link_speed="Unknown\n", max_link_width="0\n")
    device(tmp_path, "0000:00:02.0", **{"class": "0x030000\n", "vendor": "0x8086\n"}, **fast)
    device(tmp_path, "0000:20:00.0", **{"class": "0x020000\n", "vendor": "0x10de\n"}, **fast)
    found = gpu_links(tmp_path)
    assert found == [Link("0000:19:00.0", 5, 16, node=1), Link("0000:1a:00.0", 4, 8)]
    assert [link.bandwidth for link in found] == [64e9, 16e9]


SMI = """#!/bin/sh
case "$*" in
"--query-gpu=name,memory.total --format=csv,noheader,nounits") {answer};;
*) exit 3;;
esac
"""


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 'NVIDIA H200, 143771'; echo 'NVIDIA H200, 143771'", ("NVIDIA H200", 143771)),
        ("echo 'NVIDIA-SMI has failed'; exit 9", None),
        ("true", None),
    ],
)
def test_the_installed_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    expected: tuple[str, int] | None,
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI.format(answer=answer))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = installed_gpu()
    assert (found and (found.name, found.memory >> 20)) == expected
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert installed_gpu() is None


def test_this_machine_can_be_read() -> None:
    found = HostMemory.read()
    assert found is not None
    assert 0 < found.available < found.total
    assert numa_nodes() >= 1
    assert isinstance(host.gpu_links(), list)


def test_doctor_shows_memory_limits_and_links(tmp_path: Path) -> None:
    write(tmp_path, proc__meminfo=MEMINFO)
    write(tmp_path, proc__self__limits="Max locked memory  65536  65536  bytes\n")
    found = {check.name: check.found for check in doctor.memory(tmp_path, on_gpu=False)}
    assert found == {
        "host memory": "this machine: 48.00 GiB available of 64.00 GiB, no container limit",
        "memory that may be locked": "0 MiB (ulimit -l)",
        "NUMA nodes": "1",
    }
    unknown = {check.name: check.found for check in doctor.memory(tmp_path / "no", on_gpu=True)}
    assert unknown["host memory"] == "cannot be read: no /proc/meminfo"
    assert unknown["memory that may be locked"] == "no limit"
    assert unknown["links of GPUs"].startswith("cannot be read: /sys/bus/pci shows no NVIDIA GPU")
    gpu = {"class": "0x030200\n", "vendor": "0x10de\n", "numa_node": "1\n"}
    device(
        tmp_path, "0000:19:00.0", **gpu, max_link_speed="32.0 GT/s PCIe\n", max_link_width="16\n"
    )
    links = doctor.memory(tmp_path, on_gpu=True)[-1].found
    assert links == "0000:19:00.0: PCIe 5 x16 (64 GB/s each way), NUMA node 1"
