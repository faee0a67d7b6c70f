"""Every kernel compiles for the GPUs it is meant for, fits shared memory and spills little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from hipserve import HiPConfig, platform
from hipserve.ops import build_index
from hipserve.platform import interpreting, triton_library

pytestmark = pytest.mark.skipif(
    interpreting() or bool(triton_library()), reason="needs Triton's compiler"
)
SHARED = {80: 166912, 89: 101376, 90: 232448}
KERNELS = {
    "attention_kernel",
    "merge_kernel",
    "turn_kernel",
    "hopper_kernel",
    "baseline_kernel",
    "search_kernel",
    "write_kernel",
    "summaries_kernel",
    "append_kernel",
    "completed_kernel",
    "resolve_kernel",
    "load_kernel",
    "store_kernel",
}
SPILLED = {
    "3.6": {"attention_kernel": 64, "hopper_kernel": 32, "resolve_kernel": 16},
    "3.7": {
        "attention_kernel": 64,
        "hopper_kernel": 32,
        "search_kernel": 16,
        "resolve_kernel": 16,
    },
    "3.8": {
        "attention_kernel": 192,
        "hopper_kernel": 32,
        "search_kernel": 16,
        "resolve_kernel": 16,
    },
}
"""Bytes a thread that a kernel may spill with each Triton, 0 where it is not named. The largest
tiles of attention spill and are nevertheless the fastest; the kernel for Hopper spills nothing
inside its loops over tiles."""


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_ahead(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("ahead.py")
    run = subprocess.run(
        [sys.executable, script, str(capability)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    limits = SPILLED.get(version("triton")[:3], SPILLED["3.8"])
    if capability == 90:
        assert {name.split()[0] for name in found} >= KERNELS
        assert not [name for name in found if "other counts" in name], "compiled for every length"
    for name, needs in found.items():
        assert needs["shared_bytes"] <= SHARED[capability], name
        assert needs["spilled_bytes"] <= limits.get(name.split()[0], 0), f"{name}: {needs}"


def test_float32_heads_too_wide_for_a_small_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "gpu_shared_memory", lambda _: SHARED[89])
    gpu = torch.device("cuda")
    refusal = platform.triton_refusal(gpu, torch.float32, 512)
    assert refusal == "float32 with head_dim 512 needs more shared memory than 101376 bytes"
    assert not platform.triton_refusal(gpu, torch.bfloat16, 512)
    assert "head_dim from 1 to 512, not 513" in platform.triton_refusal(gpu, torch.bfloat16, 513)
    monkeypatch.setattr(platform, "gpu_shared_memory", lambda _: SHARED[90])
    assert not platform.triton_refusal(gpu, torch.float32, 512)


class Nothing:
    """A kernel whose launches do nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: None


def test_kernels_that_compile_for_minutes_are_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hipserve.ops.select_blocks.operator import search_inputs
    from hipserve.ops.select_blocks.spec import search_spec
    from hipserve.ops.select_blocks.triton import launch

    for kernel in ("baseline_kernel", "search_kernel"):
        monkeypatch.setattr(launch, kernel, Nothing())
    for budget in (4096, 65536):
        config = HiPConfig(budget=budget)
        q, pages = torch.zeros(1, 4, 64), torch.zeros(1, 256, 2, 64)
        index = build_index(pages, backend="reference")
        table, blocks = torch.zeros(1, 4096, dtype=torch.int32), torch.zeros(1, 4).int()
        inputs = search_inputs(q, index, table, blocks, blocks[:, 0], config=config)
        launch.select_blocks(inputs, search_spec(config))
    assert [record.getMessage().split("(")[1].split(",")[0] for record in caplog.records] == [
        "budget=65536"
    ]
