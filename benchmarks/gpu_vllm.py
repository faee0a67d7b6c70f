"""Inside vLLM on one GPU: first tokens and tokens a second, HiP and vLLM's own attention.

    python benchmarks/gpu_vllm.py --csv docs/data/vllm-gpu.csv
    python benchmarks/gpu_vllm.py --profile FOLDER --lengths 8k,32k --batches 1,8

A model of the 8B Llama shape with random weights in bfloat16 (its speed is a trained one's), the
same for both. Each backend has a process of its own: HiP is `CUSTOM`, and FLASH_ATTN is what vLLM
chooses itself on Hopper. Everything else is vLLM's default but for `--flags`: sequences at a time,
and the sizes of the CUDA graphs that serve them.

First tokens are of prompts that share nothing with others. A batch is of prompts that were read
before: vLLM finds their keys, so that all of them decode at once. Where their keys do not fit the
card, they begin with the same text, as long as needed. Times are medians: of first tokens, and of
all steps in which every sequence of the batch gets a token.

Nothing is printed unless the answers agree: prompts short enough that HiP reads every key have the
log-probabilities of dense attention, alone and in a batch. Answers about longer ones are not
compared: in random weights most keys are as good as others, and which of them a search finds is
decided by rounding, whose effect such a model then multiplies.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hipserve.cli.numbers import parse_count
from options import launch, need_gpu

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
SIZES = [1, 2, 4, 8, 16, 32, 64]
FLAGS = {"max_num_seqs": 64, "compilation_config": {"cudagraph_capture_sizes": SIZES}}
SPREAD = 0.02
"""Standard deviation of the weights: attention is neither even nor a single key's."""
DUMMY_SPREAD = 1e-3 / 3**0.5
"""That of vLLM's dummy weights."""
CHECKED = 4096
"""Tokens of prompts whose answers are compared: HiP reads all of them."""
TOLERANCE = 0.15
"""Of log-probabilities, whose spread is 1.3: bfloat16 through 32 layers."""
ALIKE = 0.5
"""Share of the likeliest tokens that both have with pages in fp8: vLLM's kernel rounds queries and
weights too, and from another first token on answers have nothing in common."""
LIKELIEST = 8
MARGIN = 0.98
"""Share of the KV cache that a batch may fill."""
SHARED = 8192
"""Steps in which prompts share more."""
FOUND = "result: "

Step = dict[int, float]


@dataclass
class Answers:
    """What prompts got.

    first: seconds to the first token of the last one. steps: seconds between tokens, while all
    decode. likely: of every prompt and step the likeliest tokens with their log-probabilities.
    """

    first: float = 0.0
    steps: list[float] = field(default_factory=list)
    likely: list[list[Step]] = field(default_factory=list)


class Engine:
    """vLLM with random weights, in this process."""

    def __init__(self, backend: str, flags: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights and profile: in this process
        from vllm import LLM

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
            self.start_s = time.perf_counter() - began
        llm.apply_model(spread_weights)
        self.engine, self.numbers = llm.llm_engine, itertools.count()
        cache = self.engine.vllm_config.cache_config
        self.tokens = cache.num_gpu_blocks * cache.block_size

    def answer(self, prompts: list[list[int]], count: int, *, likely: bool = False) -> Answers:
        """`count` tokens to each prompt, all of them at a time."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = SamplingParams(
            temperature=0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            logprobs=LIKELIEST if likely else None,
            output_kind=RequestOutputKind.DELTA,
        )
        began, found = time.perf_counter(), Answers(likely=[[] for _ in prompts])
        row: dict[str, int] = {}
        for i, ids in enumerate(prompts):
            name = str(next(self.numbers))
            self.engine.add_request(name, {"prompt_token_ids": ids}, asked)
            row[name] = i
        got, stamps = [0] * len(prompts), list[float]()
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            all_decoded = all(got) and len(outputs) == len(prompts)
            for output in outputs:
                i, (one,) = row[output.request_id], output.outputs
                got[i] += len(one.token_ids)
                for token, step in zip(one.token_ids, one.logprobs or (), strict=False):
                    found.likely[i].append({token: step[token].logprob} | logprobs_of(step))
            if all_decoded:
                stamps.append(now)
            elif all(got) and not found.first:
                found.first = now - began
        found.steps = [b - a for a, b in itertools.pairwise(stamps)][2:]
        return found


def spread_weights(model: Any) -> None:
    """Dummy weights are all tiny, those of norms too: no layer would do much."""
    import torch

    with torch.inference_mode():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(SPREAD / DUMMY_SPREAD)
            else:
                weight.fill_(1)


def logprobs_of(step: Any) -> Step:
    return {int(token): float(value.logprob) for token, value in step.items()}


def random_ids(seed: str, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, SHAPE["vocab_size"]) for _ in range(count)]


def prompts_of(length: int, count: int, shared: int) -> list[list[int]]:
    """They begin with the same tokens; the first one is always the same."""
    ids = [random_ids(f"{length} {i}", length) for i in range(count)]
    return [ids[0][:shared] + x[shared:] for x in ids]


def planned(options: argparse.Namespace, tokens: int) -> dict[int, tuple[list[int], int]]:
    """Of every length the batches, and how many tokens their prompts share.

    `max` is as many as fit without sharing, if that is more than the others.

    tokens: of the KV cache.
    """
    room, plan = int(tokens * MARGIN), {}
    most = options.flags.get("max_num_seqs", SIZES[-1])
    for length in options.lengths:
        each = length + options.steps
        batches = sorted(int(x) for x in options.batches if x != "max")
        fits = min(room // each, most)
        if "max" in options.batches and fits > max(batches, default=0):
            batches.append(fits)
        over = max(max(batches) * each - room, 0)
        shared = -(-over // max(max(batches) - 1, 1) // SHARED) * SHARED
        plan[length] = batches, shared
    return plan


@contextlib.contextmanager
def profiled(folder: str | None, name: str) -> Iterator[None]:
    """Writes where the time on the device went; without a folder, does nothing."""
    if folder is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        yield
    averages = found.key_averages()
    text = [averages.table(sort_by=f"self_{x}_time_total", row_limit=45) for x in ("cuda", "cpu")]
    Path(folder, f"{name}.txt").write_text("\n".join(text), encoding="utf-8")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All lengths and batches of one backend."""
    backend, flags = options.side, options.flags
    engine = Engine(backend, flags)
    about = {"backend": backend, "start_s": engine.start_s, "cache_tokens": engine.tokens}
    found: dict[str, Any] = {"rows": []}
    checked = prompts_of(CHECKED, 8, 0)
    found["alone"] = [engine.answer([ids], 16, likely=True).likely[0] for ids in checked]
    found["together"] = engine.answer(checked, 16, likely=True).likely
    found["plan"] = options.plan or list(planned(options, engine.tokens).items())
    for length, (batches, shared) in found["plan"]:
        fresh = prompts_of(length, 4, 0)
        began = time.perf_counter()
        engine.answer(fresh[-1:], 4)  # compiles kernels
        first_answer = time.perf_counter() - began
        timed = [engine.answer([ids], 1).first for ids in fresh[:3]]
        with profiled(options.profile, f"{backend}-{length}-first"):
            if options.profile:
                engine.answer([random_ids("profiled", length)], 1)
        prompts = prompts_of(length, max(batches), shared)
        for ids in prompts:
            engine.answer([ids], 1)
        for batch in batches:
            steps = engine.answer(prompts[:batch], options.steps).steps
            with profiled(options.profile, f"{backend}-{length}-{batch}"):
                if options.profile:
                    engine.answer(prompts[:batch], 10)
            step = statistics.median(steps)
            row = {**about, "length": length, "batch": batch, "shared": shared}
            row |= {"first_answer_s": first_answer, "first_token_s": statistics.median(timed)}
            row |= {"step_ms": step * 1e3, "tokens_per_s": batch / step}
            row["slow_step_ms"] = sorted(steps)[int(len(steps) * 0.9)] * 1e3
            found["rows"].append(row)
            say(json.dumps(row))
    return found


def difference(ours: list[list[Step]], theirs: list[list[Step]]) -> float:
    """The largest one of log-probabilities, as long as the tokens are the same.

    Tokens may differ where both are as likely: the answers are not compared from there on.
    """
    worst, compared, steps = 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=False):
        steps += len(a)
        for mine, other in zip(a, b, strict=True):
            compared += 1
            first, second = next(iter(mine)), next(iter(other))
            shared = [abs(mine[t] - other[t]) for t in mine.keys() & other.keys()]
            known = {first, second} <= mine.keys() & other.keys()
            worst = max(worst, *shared) if known else float("inf")
            if first != second:
                break
    return worst if compared * 2 > steps else float("inf")


def side(file: str, name: str, logs: str | None, *more: str) -> dict[str, Any]:
    """One side in a process of its own: the benchmark `file` with its options, and `more`."""
    command = [sys.executable, file, *sys.argv[1:], "--side", name, *more]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(logs or folder, f"{name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        lines = log.read_text(encoding="utf-8").splitlines()
    found = [line.removeprefix(FOUND) for line in lines if line.startswith(FOUND)]
    if code or not found:
        sys.exit(f"{name} FAILED ({code}):\n" + "\n".join(lines[-60:]))
    return json.loads(found[0])


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def alike(ours: list[list[Step]], theirs: list[list[Step]]) -> float:
    """Share of the likeliest first tokens that answers have in common."""
    pairs = [(a[0].keys(), b[0].keys()) for a, b in zip(ours, theirs, strict=True)]
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def compare_fp8(found: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """As `compare`, of answers from pages in fp8."""
    shares = {name: alike(found[name], dense[name]) for name in ("alone", "together")}
    for name, share in shares.items():
        say(f"{share:.0%} of the likeliest first tokens alike: {name}, {CHECKED} tokens")
    return [name for name, share in shares.items() if share < ALIKE]


def compare(found: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """What is wrong with the answers; says how far apart they are."""
    apart = {
        f"{x}, {CHECKED} tokens": difference(found[x], dense[x]) for x in ("alone", "together")
    }
    for name, value in apart.items():
        say(f"log-probabilities apart by at most {value:.3f}: {name}")
    wrong = [name for name, value in apart.items() if not value <= TOLERANCE]
    flat = statistics.mean(gap(step) for answer in dense["alone"] for step in answer)
    return [*wrong, *(["no token is likelier than others"] if flat < 2 * TOLERANCE else [])]


def gap(step: Step) -> float:
    """Between the likeliest token and the last one that is listed."""
    return max(step.values()) - min(step.values())


def table(ours: list[dict[str, Any]], dense: list[dict[str, Any]]) -> Iterator[str]:
    yield "| tokens | batch | first token: dense | HiP | | tokens/s: dense | HiP | |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|"
    for a, b in zip(ours, dense, strict=True):
        first = [b["first_token_s"], a["first_token_s"]]
        speed = [b["tokens_per_s"], a["tokens_per_s"]]
        cells = [f"{a['length']:,}", a["batch"]]
        cells += [f"{first[0]:.3f} s", f"{first[1]:.3f} s", f"{first[0] / first[1]:.2f}x"]
        cells += [f"{speed[0]:.0f}", f"{speed[1]:.0f}", f"{speed[1] / speed[0]:.2f}x"]
        yield f"| {' | '.join(map(str, cells))} |"


def write(path: str, rows: list[dict[str, Any]], flags: dict[str, Any]) -> None:
    import torch
    import triton
    import vllm

    versions = f"vllm {vllm.__version__}, torch {torch.__version__}, triton {triton.__version__}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        date = time.strftime("%Y-%m-%d")
        file.write(f"# {torch.cuda.get_device_name(0)}, {versions}, 8B Llama shape, {date}\n")
        file.write(f"# {json.dumps(flags)}\n")
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backends", nargs=2, default=["CUSTOM", "FLASH_ATTN"])
    parser.add_argument("--lengths", default="8k,32k,120k")
    parser.add_argument("--batches", default="1,8,max")
    parser.add_argument("--steps", type=int, default=64, help="tokens of an answer that is timed")
    parser.add_argument("--profile", help="folder for tables of kernels")
    parser.add_argument("--logs", help="folder for what the engines print")
    parser.add_argument("--flags", type=json.loads, default=FLAGS)
    parser.add_argument("--side", help="run this backend only, in this process")
    parser.add_argument("--plan", type=json.loads, help="batches of each length")
    parser.add_argument("--csv")
    options = parser.parse_args()
    need_gpu()
    options.lengths = [parse_count(x) for x in options.lengths.split(",")]
    options.batches = options.batches.split(",")
    if options.side:
        say(FOUND + json.dumps(measure(options)))
        return
    ours = side(__file__, options.backends[0], options.logs)
    plan = json.dumps(ours["plan"])
    dense = side(__file__, options.backends[1], options.logs, "--plan", plan)
    fp8 = options.flags.get("kv_cache_dtype", "auto").startswith("fp8")
    wrong = (compare_fp8 if fp8 else compare)(ours, dense)
    if wrong:
        sys.exit(f"the answers differ: {'; '.join(wrong)}")
    for line in table(ours["rows"], dense["rows"]):
        say(line)
    if options.csv:
        write(options.csv, ours["rows"] + dense["rows"], options.flags)


if __name__ == "__main__":
    launch(main)
