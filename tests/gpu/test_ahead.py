"""Every kernel compiles for the GPUs it is meant for, fits shared memory and spills little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hipserve.platform import interpreting, triton_library

pytestmark = pytest.mark.skipif(
    interpreting() or bool(triton_library()), reason="needs Triton's compiler"
)
SHARED = {80: 166912, 89: 101376, 90: 232448}
KERNELS = {
    "attention_kernel",
    "merge_kernel",
    "rate_kernel",
    "search_kernel",
    "write_kernel",
    "bounds_kernel",
}
LITTLE = 64
"""Bytes a thread: what the largest attention tiles cost, which are nevertheless the fastest."""


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_ahead(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("ahead.py")
    run = subprocess.run(
        [sys.executable, script, str(capability)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    if capability == 90:
        assert {name.split()[0] for name in found} >= KERNELS
    for name, needs in found.items():
        assert needs["shared_bytes"] <= SHARED[capability], name
        allowed = LITTLE if name.startswith("attention_kernel") else 0
        assert needs["spilled_bytes"] <= allowed, f"{name}: {needs}"
