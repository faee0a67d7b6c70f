"""Whole models on one GPU, dense and HiP, through transformers: time to first token and decode.

    python benchmarks/gpu_models.py --csv docs/data/models-gpu.csv

The bundled model, and one of the 8B Llama shape with random weights (its speed is a trained one's).
Dense is torch's SDPA with transformers' own cache, HiP is `attn_implementation="hip"` with a
`HiPCache`, both in the same process, in turn. `logit_difference` is how far the logits of the first
token lie apart, relative to their norm, and `same_token` whether both choose the same one.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from hipserve.integrations.transformers import HiPCache, register
from hipserve.lab.text import language_reference
from hipserve.models import load

STEPS = 24


def llama_8b() -> Any:
    """The shape of Llama 3.1 8B, random weights."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072 + 64,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
    return model.eval()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.inference_mode()
def run(model: Any, ids: Tensor, implementation: str) -> tuple[float, float, Tensor]:
    """Seconds to the first token, median seconds a further token, logits of the first."""
    register()
    model.set_attn_implementation(implementation)
    make = HiPCache if implementation == "hip" else lambda config: DynamicCache(config=config)

    def prefill() -> tuple[Any, Tensor]:
        cache = make(model.config)
        return cache, model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()

    prefill()  # compiles kernels, warms the allocator
    first, (cache, logits) = timed(prefill)
    token = logits.argmax()[None, None]
    steps: list[float] = []
    for _ in range(STEPS):
        seconds, out = timed(lambda t=token: model(t, past_key_values=cache))
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        steps.append(seconds)
    return first, statistics.median(steps[4:]), logits


def compare(name: str, model: Any, ids: Tensor) -> dict[str, Any]:
    results: dict[str, tuple[float, float, Tensor]] = {}
    for implementation in ("sdpa", "hip"):
        results[implementation] = run(model, ids, implementation)
        gc.collect()
        torch.cuda.empty_cache()
    (dense_first, dense_step, dense), (hip_first, hip_step, hip) = results.values()
    return {
        "model": name,
        "length": ids.shape[1],
        "dense_ttft_s": round(dense_first, 4),
        "hip_ttft_s": round(hip_first, 4),
        "ttft_ratio": round(dense_first / hip_first, 2),
        "dense_tokens_per_s": round(1 / dense_step, 1),
        "hip_tokens_per_s": round(1 / hip_step, 1),
        "decode_ratio": round(dense_step / hip_step, 2),
        "logit_difference": round(float((dense - hip).norm() / dense.norm()), 4),
        "same_token": bool(dense.argmax() == hip.argmax()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["bundled", "llama-8b"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 131008])
    parser.add_argument("--csv")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.models:
        if name == "bundled":
            loaded = load(device="cuda", dtype="bfloat16")
            model, text = loaded.model, loaded.tokenizer(language_reference()).input_ids
            text = torch.tensor(text, device="cuda")
            text = text.repeat(-(-max(options.lengths) // len(text)))
        else:
            model, text = llama_8b(), torch.randint(32000, (max(options.lengths),), device="cuda")
        for length in options.lengths:
            rows.append(compare(name, model, text[None, :length]))
            sys.stdout.write(" ".join(f"{key}={value}" for key, value in rows[-1].items()) + "\n")
            sys.stdout.flush()
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            device, date = torch.cuda.get_device_name(0), time.strftime("%Y-%m-%d")
            file.write(f"# {device}, torch {torch.__version__}, bfloat16, {date}\n")
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
