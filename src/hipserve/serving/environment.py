"""A server's environment: its key, its cores, how idle threads wait; what memory it may take."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from hipserve.host import HostMemory

SPIN_COUNT = 20_000
"""Turns, some tenths of a millisecond, that an idle OpenMP thread waits before it gives its core
away: longer than the gaps within a decode step, shorter than those between steps, when the API
server and its clients need the cores. OpenMP's own default spins through both."""


def make_environment(api_key: str | None, num_workers: int) -> dict[str, str]:
    """This process's environment, and what a server with so many worker processes needs."""
    own = dict(os.environ)
    if api_key:
        own["VLLM_API_KEY"] = api_key  # not on the command line, where others read it
    if on_cpu():
        cores = share_cores(sorted(_cores()), num_workers)
        own.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
        if "OMP_WAIT_POLICY" not in own:
            own.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    return own


def share_cores(cores: Sequence[int], workers: int) -> str:
    """Cores of every worker, as vLLM writes them: `0,1` for one, `0|1` for two."""
    each = max(len(cores) // workers, 1)
    parts = [cores[i * each : (i + 1) * each] or cores for i in range(workers)]
    return "|".join(",".join(map(str, part)) for part in parts)


def _cores() -> set[int]:
    return os.sched_getaffinity(0)


def on_cpu() -> bool:
    """No GPU driver: the KV cache shares the memory of everything else."""
    return not Path("/proc/driver/nvidia").exists()


UNSAID = 4 << 30
"""Bytes that count as available where the kernel does not say."""


def kv_memory(option: Callable[..., str | None], host: HostMemory | None) -> int | None:
    """Bytes of the KV cache on a CPU machine: what the flags say, or a quarter of what is
    available; None where they say it in blocks or as a share.

    option: the value of the first of some flags that is given; None for none.
    """
    given = option("--kv-cache-memory-bytes")
    if given is not None:
        return int(given) if given.isdigit() else None
    if option("--gpu-memory-utilization", "--num-gpu-blocks-override") is not None:
        return None
    return (host.available if host else UNSAID) // 4
