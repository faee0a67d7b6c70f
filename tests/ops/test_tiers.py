"""Which ISA tier runs, and what AMX asks of the operating system and of its threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from backends import TIERS, using
from hipserve import HiPConfig, platform
from hipserve.cli import doctor
from hipserve.ops import block_sparse_attention, select_blocks
from hipserve.platform import NativeLibrary, native_library
from hipserve.testing.cases import Shape, make_case
from hipserve.testing.oracle import assert_as_exact, readable

amx = pytest.mark.skipif("amx" not in TIERS, reason=native_library().amx_refusal or "no kernels")

REFUSED = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

room = ctypes.create_string_buffer(8192)  # for signals, too small for what AMX saves
stack = Stack(ctypes.cast(room, ctypes.c_void_p), 0, 8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from hipserve.platform import native_library
print(native_library().tier, native_library().amx_refusal, sep="|")
import torch
from hipserve import hip_attention
q = torch.ones(1, 100, 2, 64, dtype=torch.bfloat16)
assert torch.equal(hip_attention(q, q, q, backend="cpu"), q)
try:
    torch.ops.hipserve_cpu.set_isa(4)
except RuntimeError as error:
    print(error)
"""


@amx
def test_where_linux_refuses_tile_data_the_tier_below_runs() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tier, error = done.stdout.splitlines()
    assert tier == "avx512_bf16|Linux refuses AMX tile data: No space left on device"
    assert "expected a tier of this machine (baseline, avx2, avx512, avx512_bf16)" in error


def test_doctor_says_why_amx_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    library = NativeLibrary("avx512_bf16", amx_refusal="this CPU has no AMX")
    monkeypatch.setattr("hipserve.platform.native_library", lambda: library)
    found = doctor._native().found
    assert found.startswith("avx512_bf16 on ")
    assert found.endswith("; no amx: this CPU has no AMX")


@amx
@pytest.mark.parametrize("threads", [1, 2])
def test_tile_registers_are_given_back(threads: int) -> None:
    """torch's own kernels use them too, in the same threads."""
    case = make_case(Shape((600,), (600,), dtype=torch.bfloat16, head_dim=128))
    q, k, v = (x.transpose(0, 1)[None] for x in (case.q, case.ks[0], case.vs[0]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with using("cpu:amx"):
            outs = []
            for _ in range(3):
                ours = block_sparse_attention(case.q, case.pool, case.layout, backend="cpu")[0]
                torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                outs.append((ours, torchs))
    finally:
        torch.set_num_threads(before)
    for ours, torchs in outs:
        assert torch.equal(ours, outs[0][0])
        assert torch.equal(torchs, outs[0][1])
    torch.testing.assert_close(outs[0][0], outs[0][1][0].transpose(0, 1), atol=2e-2, rtol=2e-2)


@amx
@pytest.mark.parametrize("head_dim", [16, 48, 80, 128, 272])
@pytest.mark.parametrize("rows", [9, 16, 17, 33, 100])
def test_blocks_of_rows_that_fill_no_register(rows: int, head_dim: int) -> None:
    """Rows, keys and channels that end inside a tile; poison lies behind each."""
    shape = Shape(
        (700, 150), (rows, rows), 1, 1, head_dim, page_size=16, dtype=torch.bfloat16, seed=rows
    )
    case = make_case(shape)
    config = HiPConfig(budget=64, sliding_window=33, num_sink_tokens=16, dense_below=0)
    with using("cpu:amx") as name:
        chosen = select_blocks(case.q, case.index, case.layout, config=config, backend=name)
        for selection in (None, chosen):
            out, lse = block_sparse_attention(
                case.q, case.kv.pool, case.layout, selection, config=config, backend=name
            )
            assert_as_exact(out, lse, case, readable(case, selection, config))


@pytest.mark.skipif(not TIERS, reason="no native kernels")
def test_kernels_of_another_version_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old library beside new code must not run: its calls read other arguments."""
    monkeypatch.setattr(platform, "NATIVE_CALLS", platform.NATIVE_CALLS + 1)
    found = platform.native_library.__wrapped__()
    assert found.tier is None
    assert "of another version" in found.reason
