"""Whole models on one GPU, dense and HiP, through transformers: time to first token and decode.

    python benchmarks/gpu_models.py --csv docs/data/models-gpu.csv

The bundled model, and one of the 8B Llama shape with random weights (its speed is a trained one's).
Dense is torch's SDPA with transformers' own cache, HiP is `attn_implementation="hip"` with a
`HiPCache`, in the same process, in turn; HiP's decode steps run one launch after the other, then as
CUDA graphs (`capture_decode`). `logit_difference` is how far the logits of the first token lie
apart, relative to their norm, `same_token` whether both choose the same one, `step_difference` the
same of all steps with and without a graph. `record_s` is the step that records the graph.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from hipserve.integrations.transformers import HiPCache, capture_decode, register
from hipserve.lab.text import language_reference
from hipserve.models import load
from options import launch, need_gpu

STEPS = 48
SETTLED = 12
"""Steps after which one is recorded."""


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


@dataclass
class Run:
    """What one kind of attention took, and what it answered."""

    first: float
    steps: list[float]
    tokens: list[Tensor]
    logits: list[Tensor]

    @property
    def per_second(self) -> float:
        return 1 / statistics.median(self.steps[SETTLED:])


@torch.inference_mode()
def run(model: Any, ids: Tensor, implementation: str, tokens: list[Tensor]) -> Run:
    """A prompt twice, then single tokens: these, or the likeliest."""
    register()
    model.set_attn_implementation(implementation)
    make = HiPCache if implementation == "hip" else lambda config: DynamicCache(config=config)

    def prefill() -> tuple[Any, Tensor]:
        cache = make(model.config)
        return cache, model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()

    prefill()  # compiles kernels, warms the allocator
    first, (cache, logits) = timed(prefill)
    made = Run(first, [], [], [logits])
    for i in range(STEPS):
        token = tokens[i] if tokens else made.logits[-1].argmax()[None, None]
        seconds, out = timed(lambda t=token: model(t, past_key_values=cache))
        made.steps.append(seconds)
        made.tokens.append(token)
        made.logits.append(out.logits[0, -1].float())
    return made


@torch.inference_mode()
def generate(model: Any, ids: Tensor) -> float:
    """Tokens a second of `model.generate` behind a prompt that a cache holds."""
    cache = HiPCache(model.config)
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    begin = ids
    seconds = 0.0
    for count in (16, 128):  # the first one records
        seconds, begin = timed(
            lambda n=count, x=begin: model.generate(
                x,
                attention_mask=torch.ones_like(x),
                past_key_values=cache,
                max_new_tokens=n,
                **options,
            )
        )
    return 128 / seconds


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


def compare(name: str, model: Any, ids: Tensor) -> dict[str, Any]:
    model.__dict__.pop("forward", None)  # a model that was loaded is captured already
    dense = run(model, ids, "sdpa", [])
    torch.cuda.empty_cache()
    eager = run(model, ids, "hip", [])
    torch.cuda.empty_cache()
    capture_decode(model)
    graph = run(model, ids, "hip", eager.tokens)
    torch.cuda.empty_cache()
    generated = generate(model, ids)
    del model.forward
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "model": name,
        "length": ids.shape[1],
        "dense_ttft_s": round(dense.first, 4),
        "hip_ttft_s": round(eager.first, 4),
        "ttft_ratio": round(dense.first / eager.first, 2),
        "dense_tokens_per_s": round(dense.per_second, 1),
        "hip_eager_tokens_per_s": round(eager.per_second, 1),
        "hip_tokens_per_s": round(graph.per_second, 1),
        "generate_tokens_per_s": round(generated, 1),
        "decode_ratio": round(graph.per_second / dense.per_second, 2),
        "record_s": round(max(graph.steps[:SETTLED]), 3),
        "logit_difference": round(apart(dense.logits[0], eager.logits[0]), 4),
        "same_token": bool(dense.logits[0].argmax() == eager.logits[0].argmax()),
        "step_difference": round(
            max(apart(a, b) for a, b in zip(eager.logits, graph.logits, strict=True)), 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["bundled", "llama-8b"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 131008])
    parser.add_argument("--csv")
    options = parser.parse_args()
    need_gpu()
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
    launch(main)
