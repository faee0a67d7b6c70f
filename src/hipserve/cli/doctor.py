"""`hipserve doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.output import err, result_json, show
from hipserve.config import HiPConfig


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
        checks = [*parts, *_gpu()]
    if json:
        result_json([asdict(check) for check in checks])
    else:
        table = Table("", "check", "found", "what to do")
        for check in checks:
            mark = "[green]ok[/green]" if check.ok else "[red]no[/red]"
            table.add_row(mark, check.name, check.found, check.advice)
        show(table)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


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
