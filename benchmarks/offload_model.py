"""A whole transformers model with keys and values in host memory, compared with the same beside it.

    python benchmarks/offload_model.py                   # 128k tokens, an 8B model's shape, a GPU

The weights are random, so the answers mean nothing; both caches have to give the same ones. Decode
steps are replayed as CUDA graphs on a GPU (`capture_decode`), where `--device-memory` has room for
all tiles that a row may read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import hipserve
from hipserve.cli.numbers import parse_count
from hipserve.integrations.transformers.capture import FIRST_STEPS
from options import launch, need_gpu

SHAPE = Path(__file__).parent.parent / "docs" / "data" / "shape-8b.json"


def build(path: Path, device: str) -> Any:
    """A model of this shape with random weights."""
    hipserve.register()
    config = AutoConfig.for_model(**json.loads(path.read_text()))
    config.hip = {"code_bits": 4, "rerank": 8}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="hip"
        ).eval()
    return hipserve.capture_decode(model) if device == "cuda" else model


def forward(model: Any, ids: Tensor, cache: hipserve.HiPCache) -> Tensor:
    """`[1, 1]` int64: the token that follows ids `[1, tokens]`."""
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    model: Any, ids: Tensor, cache: hipserve.HiPCache, options: argparse.Namespace
) -> tuple[Tensor, dict[str, Any]]:
    """The tokens of both answers, and what they took; ids `[1, tokens]`, text and question."""
    device, chunk, new = options.device, options.chunk, options.new
    text, question = ids[:, : options.tokens], ids[:, options.tokens :]
    times = [clock(device)]
    for piece in text.split(chunk, dim=1):
        token = forward(model, piece, cache)
    times.append(clock(device))
    tokens = [token]
    tokens.append(forward(model, tokens[-1], cache))  # finds an empty arena
    times.append(clock(device))
    for _ in range(2 * FIRST_STEPS):  # one of them is recorded
        tokens.append(forward(model, tokens[-1], cache))
    times.append(clock(device))
    for _ in range(new):
        tokens.append(forward(model, tokens[-1], cache))
    times.append(clock(device))
    if question.numel():
        tokens.append(forward(model, question, cache))
        times.append(clock(device))
    seconds = [end - begin for begin, end in itertools.pairwise(times)]
    needed, loaded = cache.count_loads()
    return torch.cat(tokens, dim=1), {
        "first_token_s": seconds[0],
        "first_step_s": seconds[1],
        "recording_s": seconds[2],
        "tokens_a_s": new / seconds[3],
        "question_s": seconds[4:],
        "hit_ratio": 1 - loaded / max(needed, 1),
        "bytes": [cache.device_nbytes, cache.host_nbytes],
    }


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--config", type=Path, default=SHAPE)
    parse.add_argument("--tokens", type=parse_count, default=131072)
    parse.add_argument("--chunk", type=parse_count, default=131072)
    parse.add_argument("--question", type=int, default=64)
    parse.add_argument("--new", type=int, default=48, help="tokens of an answer")
    parse.add_argument("--host-memory", default="20GiB")
    parse.add_argument("--device-memory", default="3.2GiB")
    parse.add_argument("--device", default="cuda")
    options = parse.parse_args()
    need_gpu(options.device)
    model = build(options.config, options.device)
    ids = torch.randint(1000, (1, options.tokens + options.question), device=options.device)

    def cache(side: str) -> hipserve.HiPCache:
        offload = None
        if side == "offloaded" and options.device == "cpu":
            offload = hipserve.Offload(options.host_memory, file=tempfile.gettempdir())
        elif side == "offloaded":
            offload = hipserve.Offload(options.host_memory, options.device_memory)
        return hipserve.HiPCache(model.config, offload=offload)

    sides = ("resident", "offloaded")
    with torch.no_grad():
        for side in sides:
            measure(model, ids, cache(side), options)
        # all is compiled
        answers: list[Tensor] = []
        for side in sides:
            answer, found = measure(model, ids, cache(side), options)
            answers.append(answer)
            sys.stdout.write(json.dumps({"side": side, **found}) + "\n")
            sys.stdout.flush()
    assert torch.equal(*answers), "answers differ"


if __name__ == "__main__":
    launch(main)
