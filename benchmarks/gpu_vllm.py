"""vLLM on one GPU with default flags: how it starts, and one long prompt, HiP and vLLM's own.

    python benchmarks/gpu_vllm.py --csv docs/data/vllm-gpu.csv

A model of the 8B Llama shape with random weights in bfloat16 (its speed is a trained one's). Each
backend runs in a process of its own, with nothing set but `--attention-backend` (HiP is `CUSTOM`;
FLASH_ATTN is what vLLM chooses itself on Hopper). If the engine does not start so, the reason is
printed and `--compilation-config '{"mode": 0}'` is tried, and after that `--enforce-eager`: the
column `flags` says what ran.

`free_*_gib` is what the card has before the engine, with its weights, and when it is ready.
`profile_cache_gib` is the KV cache that vLLM makes to measure its CUDA graphs, and
`profile_left_gib` what is left of it after vLLM has dropped it: nothing, or the real cache has
less room.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FALLBACKS: list[dict[str, Any]] = [
    {},
    {"compilation_config": {"mode": 0}},
    {"enforce_eager": True},
]
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
GIB = 2**30
FOUND = "result: "


def free_gib() -> float:
    import torch

    return torch.cuda.mem_get_info()[0] / GIB


def watch_profile(found: dict[str, Any]) -> None:
    """Notes the memory around the KV cache that vLLM makes to measure CUDA graphs.

    These functions are vLLM's own affair: where a version has no such pair, nothing is noted.
    """
    import torch
    from vllm.v1.worker.gpu import cudagraph_utils

    names = ("_init_minimal_kv_cache_for_profiling", "_teardown_profiling_state")
    if not all(hasattr(cudagraph_utils, name) for name in names):
        return
    begin, end = (getattr(cudagraph_utils, name) for name in names)
    held = [0]

    def allocated() -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def noting_begin(runner: Any) -> None:
        held[0] = allocated()
        begin(runner)
        found["profile_cache_gib"] = (allocated() - held[0]) / GIB
        found["profile_blocks"] = runner.cache_config.num_gpu_blocks

    def noting_end(runner: Any) -> None:
        end(runner)
        found["profile_left_gib"] = (allocated() - held[0]) / GIB

    setattr(cudagraph_utils, names[0], noting_begin)
    setattr(cudagraph_utils, names[1], noting_end)


def watch_weights(found: dict[str, Any]) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    load = Worker.load_model

    def noting(worker: Any, *positional: Any, **named: Any) -> Any:
        result = load(worker, *positional, **named)
        found["free_with_weights_gib"] = free_gib()
        return result

    Worker.load_model = noting


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def run(backend: str, flags: dict[str, Any], length: int, tokens: int) -> dict[str, Any]:
    """Starts an engine in this process and answers prompts that share no prefix."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # memory is read in this process
    from vllm import LLM, SamplingParams

    found: dict[str, Any] = {"backend": backend, "flags": json.dumps(flags)}
    found["free_before_gib"] = free_gib()
    watch_profile(found)
    watch_weights(found)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
        began = time.perf_counter()
        llm = LLM(
            folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            attention_backend=backend,
            **flags,
        )
        found["start_s"] = time.perf_counter() - began
    cache = llm.llm_engine.vllm_config.cache_config
    found["free_ready_gib"] = free_gib()
    found["kv_blocks"], found["block_size"] = cache.num_gpu_blocks, cache.block_size
    found["kv_tokens"] = cache.num_gpu_blocks * cache.block_size

    def answer(seed: int, count: int) -> float:
        rng = random.Random(seed)
        ids = [rng.randrange(3, SHAPE["vocab_size"]) for _ in range(length)]
        asked = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        return timed(lambda: llm.generate({"prompt_token_ids": ids}, asked, use_tqdm=False))

    found["prompt_tokens"], found["first_answer_s"] = length, answer(0, tokens)  # compiles kernels
    first = statistics.median(answer(seed, 1) for seed in (1, 2, 3))
    whole = statistics.median(answer(seed, tokens) for seed in (4, 5, 6))
    found["first_token_s"] = first
    found["tokens_per_s"] = (tokens - 1) / (whole - first)
    return found


def attempt(backend: str, flags: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One engine in a process of its own; empty, and the reason printed, if it does not run."""
    words = ["--backends", backend, "--flags", json.dumps(flags)]
    words += ["--length", str(options.length), "--tokens", str(options.tokens)]
    command = [sys.executable, __file__, *words]
    began = time.perf_counter()
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds)
        output, code = child.stdout + child.stderr, str(child.returncode)
    except subprocess.TimeoutExpired as error:
        output, code = str(error.stderr or b"", "utf-8", "replace"), "out of time"
    if options.logs:
        name = f"{backend}-{FALLBACKS.index(flags)}.log"
        Path(options.logs, name).write_text(output, encoding="utf-8")
    for line in output.splitlines():
        if line.startswith(FOUND):
            return json.loads(line.removeprefix(FOUND))
    say(f"{backend} {flags} FAILED ({code}, {time.perf_counter() - began:.0f} s):")
    say("\n".join(output.splitlines()[-options.tail :]))
    return {}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write(path: str, rows: list[dict[str, Any]]) -> None:
    import torch
    import triton
    import vllm

    versions = f"vllm {vllm.__version__}, torch {torch.__version__}, triton {triton.__version__}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        date = time.strftime("%Y-%m-%d")
        file.write(f"# {torch.cuda.get_device_name(0)}, {versions}, 8B Llama shape, {date}\n")
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backends", nargs="+", default=["CUSTOM", "FLASH_ATTN"])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--seconds", type=float, default=260, help="for one attempt")
    parser.add_argument("--tail", type=int, default=30, help="lines of a failed attempt to print")
    parser.add_argument("--logs", help="folder for what the engines print")
    parser.add_argument("--flags", help="run one engine in this process, with these flags")
    parser.add_argument("--csv")
    options = parser.parse_args()
    if options.flags is not None:
        flags = json.loads(options.flags)
        found = run(options.backends[0], flags, options.length, options.tokens)
        say(FOUND + json.dumps(found))
        return
    rows: list[dict[str, Any]] = []
    for backend in options.backends:
        for flags in FALLBACKS:
            if found := attempt(backend, flags, options):
                rows.append(found)
                short = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
                say(" ".join(f"{name}={value}" for name, value in short.items()))
                break
    if options.csv and rows:
        write(options.csv, rows)
    if len(rows) < len(options.backends):
        sys.exit(1)


if __name__ == "__main__":
    main()
