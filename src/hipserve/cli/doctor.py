"""`hipserve doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.numbers import format_bytes
from hipserve.cli.output import READABLE, err, result_json, show
from hipserve.cli.plan_text import describe_host
from hipserve.config import HiPConfig
from hipserve.host import ROOT, HostMemory, gpu_links, locked_memory, numa_nodes
from hipserve.serving.environment import on_cpu


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check; `advice` says what to do if it is not `ok`."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def doctor(json: options.Json = False) -> None:
    """Checks the installation; exit code 1 if something is wrong."""
    with err.status("checking …"):
        parts = [_native(), _crossover(), _operation("cpu"), _transformers(), _bundled_model()]
        checks = [*parts, _index(), *memory(on_gpu=not on_cpu()), *_gpu()]
    if json:
        result_json([asdict(check) for check in checks])
    else:
        table = Table("", "check", "found", "what to do")
        for check in checks:
            mark = "[green]ok[/green]" if check.ok else "[red]no[/red]"
            table.add_row(mark, check.name, check.found, check.advice)
        show(table, READABLE)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def memory(root: Path = ROOT, *, on_gpu: bool) -> list[Check]:
    """What this machine has for keys and values, its limits, and the way to its GPUs.

    root: where /proc and /sys are.
    """
    host, pinned = HostMemory.read(root), locked_memory(root)
    found = describe_host(host) if host else "cannot be read: no /proc/meminfo"
    limit = "no limit" if pinned is None else f"{format_bytes(pinned)} (ulimit -l)"
    nodes = numa_nodes(root)
    checks = [
        Check("host memory", True, found),
        Check("memory that may be locked", True, limit),
        Check("NUMA nodes", True, str(nodes)),
    ]
    return [*checks, Check("links of GPUs", True, _links(root))] if on_gpu else checks


def _links(root: Path) -> str:
    links = [
        f"{link.address}: PCIe {link.generation} x{link.width} ({link.bandwidth / 1e9:.0f} GB/s "
        f"each way)" + ("" if link.node is None else f", NUMA node {link.node}")
        for link in gpu_links(root)
    ]
    return "; ".join(links) or "cannot be read: /sys/bus/pci shows no NVIDIA GPU and its link"


def _index() -> Check:
    """What an index takes of the 8B shape, by bits of its codes."""
    from hipserve.plan.parts import index_bytes

    token = 2 * 8 * 128 * 2 * 256
    sizes = (
        f"{index_bytes(256, 8, 128, key_bytes=2, form=config.index_form) / token:.1%} with "
        f"code_bits={config.code_bits}"
        for config in (HiPConfig(code_bits=bits) for bits in (16, 8, 4))
    )
    return Check("index of head_dim 128", True, f"of keys and values: {', '.join(sizes)}")


def _native() -> Check:
    from hipserve.platform import cpu_name, native_library

    library = native_library()
    if library.tier:
        missing = f"; no amx: {library.amx_refusal}" if library.amx_refusal else ""
        return Check("native CPU kernels", True, f"{library.tier} on {cpu_name()}{missing}")
    advice = "install gcc 12 or newer and reinstall hipserve; until then eager torch is used"
    return Check("native CPU kernels", False, library.reason, advice)


def _crossover() -> Check:
    """Dense kernel and crossover of layers of the 8B shape, in each precision."""
    import torch

    from hipserve.attention.crossover import dense_kernel, rule_for

    found: list[str] = []
    for dtype in (torch.bfloat16, torch.float32):
        kind = (dtype, 128, 4)
        rule = rule_for(HiPConfig(), torch.device("cpu"), *kind)
        kernel = "torch" if dense_kernel("cpu", *kind) == "sdpa" else "hipserve"
        found.append(
            f"{str(dtype).removeprefix('torch.')}: dense by {kernel}, pruned from "
            f"{rule.dense_below} tokens on, decode steps from {rule.decode_dense_below}"
        )
    return Check("crossover on the CPU", True, "; ".join(found))


def _operation(device: str) -> Check:
    """With a budget for every key, HiP attention equals dense attention."""
    import torch
    import torch.nn.functional as F

    from hipserve.attention.hip import hip_attention

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 300, 4, 64, generator=generator).to(device)
    k, v = torch.randn(2, 1, 300, 2, 64, generator=generator).to(device)
    out = hip_attention(q, k, v, config=HiPConfig(budget=512))
    assert isinstance(out, torch.Tensor)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    error = float((out.transpose(1, 2) - dense).abs().max())
    name = "dense result" if device == "cpu" else "dense result on the GPU"
    right = error < 1e-4
    advice = "" if right else "report it as a bug"
    return Check(name, right, f"error {error:.1e} against SDPA", advice)


def _transformers() -> Check:
    import transformers

    from hipserve.integrations.transformers import NAME, register

    register()
    known = NAME in transformers.AttentionInterface().valid_keys()
    return Check(
        'attn_implementation="hip"',
        known,
        f"transformers {transformers.__version__}",
        "" if known else "install transformers>=5.17,<5.24",
    )


def _bundled_model() -> Check:
    from hipserve.errors import ArgumentError
    from hipserve.models import load

    try:
        loaded = load(device="cpu")
    except (ArgumentError, StopIteration):
        return Check("bundled model", False, "does not load", "reinstall hipserve")
    weights = sum(x.numel() for x in loaded.model.parameters())
    return Check("bundled model", True, f"{loaded.name}, {weights / 1e6:.1f} M parameters")


def _gpu() -> list[Check]:
    from hipserve.platform import gpu_name, triton_library

    name, refusal = gpu_name(), triton_library()
    if name is None:
        return [Check("GPU", True, "none, not needed")]
    if refusal:
        advice = "install triton; until then eager torch is used on the GPU"
        return [Check("GPU", False, f"{name}: {refusal}", advice)]
    return [Check("GPU", True, f"triton on {name}"), _operation("cuda")]
