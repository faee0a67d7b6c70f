"""Inside vLLM on one GPU: HiP attention with keys and values in host memory, and beside the model.

    python benchmarks/offload_vllm.py                              # the 8B shape, 32k and 120k
    python benchmarks/offload_vllm.py --layers 4 --lengths 32k --host-memory 12GiB   # a quick look

The model is that of `gpu_vllm.py`: the shape of Llama 8B with random weights. Both sides search
codes of 4 bits, each in a process of its own, and replay decode steps as whole CUDA graphs. Their
answers are compared, tokens and log-probabilities: of a prompt alone, of a second question about
it, and of two prompts that vLLM finds, which have to have the same bits. Two prompts that are read
together agree but for rounding: one decodes while the other is read, and beside a chunk resident
keys have another kernel. Times are medians: of first tokens, and of steps in which every sequence
gets a token. A batch within `graph_requests` is replayed whole: more `--device-memory` makes it
larger. `--host-memory` has to hold two prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import gpu_vllm
from gpu_vllm import FOUND, Engine, difference, random_ids, say, side
from hipserve.cli.numbers import parse_count, parse_size
from options import launch, need_gpu

SIDES = ("resident", "offloaded")
BLOCK = 256
QUESTION = 64
"""Tokens of a second question."""
ANSWER = 16
"""Tokens of answers that are compared."""
MIXED_TOLERANCE = 0.3
"""Of log-probabilities, whose spread is 1.3: bfloat16 through 32 layers of random weights."""


def engine_of(options: argparse.Namespace) -> Engine:
    """The side's engine, in this process."""
    shape = gpu_vllm.SHAPE
    shape["num_hidden_layers"] = options.layers
    hip: dict[str, Any] = {"code_bits": 4, "rerank": 8, "refresh_interval": options.interval}
    flags = {"max_num_seqs": 8, "block_size": BLOCK, **options.flags}
    if options.side == "offloaded":
        token = options.layers * 2 * shape["num_key_value_heads"] * shape["head_dim"] * 2
        sizes = {"host_memory": options.host_memory, "device_memory": options.device_memory}
        hip["offload"] = sizes
        flags["num_gpu_blocks_override"] = options.host_memory // (token * BLOCK)
    return Engine("CUSTOM", {**flags, "additional_config": {"hip": hip}})


def graph_requests(engine: Engine) -> int | None:
    """Requests of the largest step that is replayed whole; None for those of vLLM."""
    from hipserve.integrations.vllm.graphs import room_of

    room = room_of(engine.engine.vllm_config)
    return None if room is None else room.rows


def loads(engine: Engine) -> tuple[float, float]:
    """Tiles needed and loaded so far."""
    from hipserve.integrations.vllm.metrics import METRICS, directory, totals

    values = totals({directory(engine.engine.vllm_config.instance_id)})
    names = [metric.name for metric in METRICS]
    needed, loaded = (values[names.index(f"hipserve_tiles_{x}")] for x in ("needed", "loaded"))
    return needed, loaded


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Answers and times of one side."""
    import torch

    engine = engine_of(options)
    found: dict[str, Any] = {"answers": {}, "rows": []}
    for length in options.lengths:
        ids = [random_ids(f"{length} {i}", length) for i in range(max(5, max(options.batches)))]
        again = ids[0] + random_ids("again", QUESTION)
        questions = [again + random_ids(f"more {i}", QUESTION) for i in range(3)]
        answers = found["answers"]
        answers[f"{length} alone"] = engine.answer(ids[:1], ANSWER, likely=True).likely
        answers[f"{length} second question"] = engine.answer([again], ANSWER, likely=True).likely
        asked = [engine.answer([x], 1).first for x in questions]
        for name in ("read together", "found together"):
            together = engine.answer(ids[1:3], ANSWER, likely=True).likely
            answers[f"{length} {name}"] = together
        first = [engine.answer([x], 1).first for x in ids[3:5]]
        row = {"side": options.side, "length": length, "first_token_s": statistics.median(first)}
        row |= {"question_s": statistics.median(asked)}
        for x in ids[: max(options.batches)]:
            engine.answer([x], 1)  # they are all found from here on
        for batch in options.batches:
            before = loads(engine)
            steps = engine.answer(ids[:batch], options.steps).steps
            needed, loaded = (b - a for a, b in zip(before, loads(engine), strict=True))
            step = statistics.median(steps)
            found["rows"].append(
                row
                | {"batch": batch, "step_ms": step * 1e3, "tokens_per_s": batch / step}
                | {"hit_ratio": 1 - loaded / needed if needed else None}
                | {"graph_requests": graph_requests(engine)}
                | {"card_bytes": torch.cuda.max_memory_allocated(), "start_s": engine.start_s}
            )
            say(json.dumps(found["rows"][-1]))
    return found


def steps_of(likely: list[list[dict[str, float]]]) -> list[list[dict[int, float]]]:
    """Numbers as they were before they were JSON."""
    return [[{int(t): p for t, p in step.items()} for step in answer] for answer in likely]


def tokens_alike(ours: list[list[dict[int, float]]], theirs: list[list[dict[int, float]]]) -> str:
    """How many tokens of the answers are the same up to the first that is not."""
    same = total = 0
    for a, b in zip(ours, theirs, strict=True):
        pairs = [next(iter(x)) == next(iter(y)) for x, y in zip(a, b, strict=True)]
        same += next((i for i, alike in enumerate(pairs) if not alike), len(pairs))
        total += len(pairs)
    return f"{same} of {total} tokens alike"


def compare(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the answers; says how far apart they are, and the times of steps."""
    wrong: list[str] = []
    for name, ours in results["offloaded"]["answers"].items():
        sides = steps_of(ours), steps_of(results["resident"]["answers"][name])
        apart = difference(*sides)
        say(f"{name}: {tokens_alike(*sides)}, log-probabilities apart by at most {apart:.4f}")
        most = MIXED_TOLERANCE if name.endswith("read together") else 0
        wrong += [name] if not apart <= most else []
    for row, other in zip(*(results[name]["rows"] for name in SIDES), strict=True):
        ms, theirs = row["step_ms"], other["step_ms"]
        times = f"{ms:.2f} ms a step resident, {theirs:.2f} offloaded ({ms / theirs:.0%})"
        graph = "" if row["batch"] <= other["graph_requests"] else ", not replayed whole"
        say(f"{row['length']}, batch {row['batch']}: {times}{graph}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--lengths", default="32k,120k")
    parser.add_argument("--batches", default="1,2")
    parser.add_argument("--interval", type=int, default=1, help="steps that share a selection")
    parser.add_argument("--steps", type=int, default=96, help="tokens of an answer that is timed")
    parser.add_argument("--host-memory", type=parse_size, default=64 * 2**30)
    parser.add_argument("--device-memory", type=parse_size, default=8 * 2**30)
    parser.add_argument("--flags", type=json.loads, default={}, help="vLLM's, as JSON")
    parser.add_argument("--logs", help="folder for what the engines print")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--side", help="run this side only, in this process")
    options = parser.parse_args()
    need_gpu()
    options.lengths = [parse_count(x) for x in options.lengths.split(",")]
    options.batches = [int(x) for x in options.batches.split(",")]
    if options.side:
        say(FOUND + json.dumps(measure(options)))
        return
    results = {name: side(__file__, name, options.logs) for name in options.sides.split(",")}
    for result in results.values():
        for row in result["rows"]:
            say(json.dumps(row))
    if set(results) < set(SIDES):
        return
    wrong = compare(results)
    if wrong:
        sys.exit(f"the answers differ: {'; '.join(wrong)}")


if __name__ == "__main__":
    launch(main)
