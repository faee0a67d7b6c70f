"""A model on a CPU whose keys and values are in a mapped file, compared with memory.

    python benchmarks/offload_file.py --tokens 16k --directory /nvme

The bundled model reads a text and continues it greedily, two caches in turn, step by step: the
tokens have to be the same. Times are medians of steps; the file is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hipserve
from hipserve.cli.numbers import parse_count
from hipserve.lab.text import language_reference
from hipserve.models.bundled import bundled_path
from options import launch

CHUNK = 4096


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--tokens", type=parse_count, default=16384)
    parse.add_argument("--steps", type=int, default=64)
    parse.add_argument("--directory", default="/tmp")
    parse.add_argument("--host-memory", default="4GiB")
    options = parse.parse_args()
    hipserve.register()
    path = bundled_path()
    words = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="hip").eval()
    model.config.hip = {"code_bits": 4, "rerank": 8, "dense_below": 2048}
    ids = words(language_reference(), return_tensors="pt")["input_ids"][:, : options.tokens]
    file = hipserve.Offload(options.host_memory, file=options.directory)
    caches = [hipserve.HiPCache(model.config, offload=offload) for offload in (None, file)]
    read, times, tokens = [0.0, 0.0], ([], []), [ids[:, -1:], ids[:, -1:]]
    with torch.inference_mode():
        for begin in range(0, options.tokens - 1, CHUNK):
            chunk = ids[:, begin : min(begin + CHUNK, options.tokens - 1)]
            for i, cache in enumerate(caches):
                began = time.perf_counter()
                model(chunk, past_key_values=cache, logits_to_keep=1)
                read[i] += time.perf_counter() - began
        for _ in range(options.steps):
            for i, cache in enumerate(caches):
                began = time.perf_counter()
                logits = model(tokens[i], past_key_values=cache, logits_to_keep=1).logits
                times[i].append(time.perf_counter() - began)
                tokens[i] = logits[:, -1].argmax(-1, keepdim=True)
            assert torch.equal(*tokens), "the tokens differ"
    steps = [statistics.median(each) * 1e3 for each in times]
    sizes = {"host_nbytes": caches[1].host_nbytes, "device_nbytes": caches[1].device_nbytes}
    result = {
        "tokens": options.tokens,
        "read_s": read,
        "read_ratio": read[1] / read[0],
        "step_ms": steps,
        "step_ratio": steps[1] / steps[0],
        "resident_nbytes": caches[0].nbytes,
    }
    sys.stdout.write(json.dumps(result | sizes) + "\n")


if __name__ == "__main__":
    launch(main)
