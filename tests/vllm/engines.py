"""What engines answer, in a process of their own: vLLM changes global state of torch.

`python engines.py SCENARIO... FILE` runs scenarios in turn and writes their results as JSON.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK = 512
NEW = 16
BLOCK_BYTES = 12 * 2 * 256 * 2 * 64 * 4
"""Keys and values of a KV block, all layers of the bundled model in float32."""
FULL = {"budget": 1 << 15}
PRUNED = {
    "budget": 128,
    "num_sink_tokens": 16,
    "sliding_window": 64,
    "query_block_size": 32,
    "dense_below": 0,
    "dense_layers": [1, 4],
    "refresh_interval": 4,
    "code_bits": 4,
}
STREAMED = {
    **PRUNED,
    "dense_layers": [],
    "refresh_interval": 1,
    "extend": "stream",
    "trained_length": 512,
}
SHORT = (1, 2, 3, 5, 17, 33, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300, 345, 400, 511)
LENGTHS = (*SHORT, 512, 513, 540, 600, 640, 700, 766, 1024, 1100, 1200, 1400, 1500)
PRUNED_LENGTHS = (3, 65, 129, 257, 345, 512, 513, 640, 700, 1024, 1100, 1500)


def prompts(lengths: tuple[int, ...] = PRUNED_LENGTHS) -> list[list[int]]:
    """Token ids of English text, one prompt a length; long ones need several chunks."""
    ids = english()
    return [ids[i * 1500 : i * 1500 + length] for i, length in enumerate(lengths)]


@functools.cache
def english() -> list[int]:
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    from hipserve.models import bundled_path

    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    text = "\n".join(topics[name] for name in sorted(topics))
    return tokenizer(text)["input_ids"]


def engine(backend: str, hip: dict[str, Any] | None = None, model: str = "", **options: Any) -> Any:
    from vllm import LLM

    from hipserve.models import bundled_path

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 29,
        "max_num_batched_tokens": CHUNK,
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "seed": 0,
        "disable_log_stats": True,
    }
    return LLM(
        model or str(bundled_path()),
        attention_config={"backend": backend},
        additional_config={} if hip is None else {"hip": hip},
        **{**settings, **options},
    )


def answers(llm: Any, ids: list[list[int]], together: bool = True) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    batches = [ids] if together else [[one] for one in ids]
    outputs = [
        out
        for batch in batches
        for out in llm.generate(
            [{"prompt_token_ids": one} for one in batch], params, use_tqdm=False
        )
    ]
    return [list(out.outputs[0].token_ids) for out in outputs]


def end(llm: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def core(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def runner(llm: Any) -> Any:
    return core(llm).model_executor.driver_worker.worker.model_runner


def builder(llm: Any) -> Any:
    return runner(llm).attn_groups[0][0].get_metadata_builder()


def preemptions(llm: Any) -> list[int]:
    """One entry for every request that is preempted from now on."""
    seen: list[int] = []
    scheduler = core(llm).scheduler
    preempt = scheduler._preempt_request

    def counted(*positional: Any, **named: Any) -> Any:
        seen.append(1)
        return preempt(*positional, **named)

    scheduler._preempt_request = counted
    return seen


def wrong_bounds(llm: Any) -> dict[str, int]:
    """Blocks that hold whole cached prefixes, and those whose bounds are not their keys' bounds."""
    from hipserve.integrations.vllm.kv_block import page_views
    from hipserve.ops import build_index

    pool = core(llm).scheduler.kv_cache_manager.block_pool
    cached = [block.block_id for block in pool.blocks if block.block_hash is not None]
    wrong = 0
    for layer in runner(llm).compilation_config.static_forward_context.values():
        if not layer.impl.keeps_index(layer):
            continue
        form = layer.impl.index_form(layer)
        pages = page_views(layer.kv_cache, form)
        keys = pages.pool.k_cache[cached].contiguous()
        made = build_index(keys, **form._asdict(), backend="reference")
        for held, expected in zip(pages.index.tensors(), made.tensors(), strict=True):
            wrong += int((held[cached] != expected).flatten(1).any(1).sum())
    return {"cached": len(cached), "wrong": wrong}


def with_transformers(ids: list[list[int]], hip: dict[str, Any] = PRUNED) -> list[list[int]]:
    """The same prompts, in the same chunks, through the transformers integration."""
    import torch

    from hipserve import HiPCache, HiPConfig
    from hipserve.models import load

    loaded = load(config=HiPConfig.from_dict(hip), dtype=torch.float32, device="cpu")
    results: list[list[int]] = []
    for prompt in ids:
        cache, tokens = HiPCache(loaded.model.config), list(prompt)
        with torch.no_grad():
            for start in range(0, len(prompt), CHUNK):
                chunk = torch.tensor([prompt[start : start + CHUNK]])
                logits = loaded.model(chunk, past_key_values=cache).logits
            for layer in cache.layers:
                layer.reuse.clear()  # a last chunk of one token is no decode step
            while len(tokens) < len(prompt) + NEW:
                tokens.append(int(logits[0, -1].argmax()))
                logits = loaded.model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
        results.append(tokens[len(prompt) :])
    return results


def full(report: dict[str, Any]) -> None:
    """Room for every key, beside vLLM's own attention: in batches, again, and short of memory."""
    ids = prompts(LENGTHS)
    llm = engine("CPU_ATTN")
    report["expected"] = answers(llm, ids)
    end(llm)
    llm = engine("CUSTOM", FULL)
    report["first"] = answers(llm, ids)
    report["prefix hits"] = answers(llm, ids)
    report["block size"] = llm.llm_engine.vllm_config.cache_config.block_size
    end(llm)
    llm = engine("CUSTOM", FULL, num_gpu_blocks_override=18, max_model_len=2048, block_size=128)
    seen = preemptions(llm)
    report["preempted"] = answers(llm, ids)
    report["preemptions"] = len(seen)
    end(llm)


def pruned(report: dict[str, Any]) -> None:
    """A small budget: alone, in company, with prefix hits, beside transformers."""
    ids = prompts()
    pool = {"num_gpu_blocks_override": 10, "max_model_len": 2048}
    llm = engine("CUSTOM", PRUNED, max_num_seqs=1, enable_prefix_caching=False, **pool)
    report["alone"] = answers(llm, ids, together=False)
    end(llm)
    llm = engine("CUSTOM", {**PRUNED, "meter": "sampled"}, num_gpu_blocks_override=48)
    report["together"] = answers(llm, ids)
    report["unread"] = unread(llm)
    report["prefix hits"] = answers(llm, ids)
    report["bounds"] = wrong_bounds(llm)
    answers(llm, ids[:1])
    report["alive"] = builder(llm).schedule.num_alive
    report["counts"] = counts(llm)
    end(llm)
    report["transformers"] = with_transformers(ids)


def streamed(report: dict[str, Any]) -> None:
    """A model that was trained on 512 positions: in a batch, with prefix hits, beside transformers;
    and what does not go with it. With prompts whose tokens noise of 2e-7 in the embeddings leaves
    as they are: at a tie of blocks both integrations may be right."""
    ids = prompts((345, 540, 700, 1100))
    overrides = {"max_position_embeddings": 4096}
    llm = engine("CUSTOM", STREAMED, num_gpu_blocks_override=48, hf_overrides=overrides)
    report["together"] = answers(llm, ids)
    report["prefix hits"] = answers(llm, ids)
    end(llm)
    report["transformers"] = with_transformers(ids, STREAMED)
    report["unextended"] = with_transformers(ids, {**STREAMED, "extend": "none"})
    for name, changes in (
        ("no length", {"trained_length": None}),
        ("dense layers", {"dense_layers": [1]}),
        ("no yarn", {"extend": "yarn"}),
    ):
        try:
            engine("CUSTOM", {**STREAMED, **changes})
            report[name] = "accepted"
        except Exception as error:
            report[name] = str(error)


def offloaded(report: dict[str, Any]) -> None:
    """The pruned prompts with keys and values in a file: together, again, and short of blocks."""
    ids = prompts()
    file = str(Path(sys.argv[-1]).with_name("kv"))
    hip = {**PRUNED, "offload": {"host_memory": 48 * BLOCK_BYTES, "file": file}}
    llm = engine("CUSTOM", hip, num_gpu_blocks_override=48)
    report["together"] = answers(llm, ids)
    report["prefix hits"] = answers(llm, ids)
    layers = runner(llm).compilation_config.static_forward_context.values()
    report["block bytes"] = sum(x.kv_cache[0].nbytes for x in layers)
    report["file left"] = Path(file).exists()
    report["counts"] = counts(llm)
    end(llm)
    llm = engine("CUSTOM", hip, num_gpu_blocks_override=10, max_model_len=2048)
    seen = preemptions(llm)
    report["preempted"] = answers(llm, ids)
    report["preemptions"] = len(seen)
    end(llm)
    for name, blocks in (("unsaid", None), ("too many", 49)):
        try:
            engine("CUSTOM", hip, num_gpu_blocks_override=blocks)
            report[name] = "accepted"
        except Exception as error:
            report[name] = str(error)


def counts(llm: Any) -> dict[str, float]:
    from hipserve.integrations.vllm import metrics

    folder = metrics.directory(llm.llm_engine.vllm_config.instance_id)
    values = metrics.totals({folder})[: len(metrics.METRICS)]
    return {m.name + (m.reason or ""): v for m, v in zip(metrics.METRICS, values, strict=True)}


def unread(llm: Any) -> dict[int, float]:
    """By layer, the mean share of attention that was metered as unread."""
    from hipserve.integrations.vllm import metrics

    folder = metrics.directory(llm.llm_engine.vllm_config.instance_id)
    layers = metrics.totals({folder})[len(metrics.METRICS) :].reshape(-1, 2)
    return {i: total / count for i, (total, count) in enumerate(layers.tolist()) if count}


def refused(report: dict[str, Any]) -> None:
    """Options that nobody can mean, refused before a model is loaded."""
    cases: dict[str, dict[str, Any]] = {
        "unknown key": {"hip": {"budgte": 1}},
        "bad value": {"hip": {"refresh_interval": 0}},
        "no table": {"hip": 3},  # type: ignore[dict-item]
        "block size": {"hip": {"bound_block_size": 32}, "block_size": 48},
        "kv dtype": {"hip": {}, "kv_cache_dtype": "fp8"},
        "other kv dtype": {"hip": {}, "kv_cache_dtype": "bfloat16"},
        "offload without a file": {"hip": {**PRUNED, "offload": {"host_memory": 9}}},
        "offload of keys": {"hip": {"offload": {"host_memory": 9, "file": "kv"}}},
        "no offload": {"hip": {**PRUNED, "offload": {"file": "kv"}}},
        "meter of a file": {
            "hip": {**PRUNED, "meter": "sampled", "offload": {"host_memory": 9, "file": "kv"}}
        },
    }
    for name, case in cases.items():
        hip = case.pop("hip")
        try:
            engine("CUSTOM", hip, **case)
            report[name] = "accepted"
        except Exception as error:
            report[name] = str(error)


def parallel(report: dict[str, Any]) -> None:
    """The pruned prompts over several workers: TP, PP or DP as the environment says."""
    options = json.loads(os.environ["HIPSERVE_TEST_PARALLEL"])
    llm = engine("CUSTOM", PRUNED, **options)
    report["together"] = answers(llm, prompts())
    end(llm)


def compiled(report: dict[str, Any]) -> None:
    """torch.compile instead of eager mode."""
    llm = engine("CUSTOM", PRUNED, enforce_eager=False)
    report["together"] = answers(llm, prompts())
    end(llm)


def reduced(report: dict[str, Any]) -> None:
    """How far bfloat16 takes the likelihood of every prompt token from float32's, in nats."""
    from vllm import SamplingParams

    ids = [one for one in prompts(LENGTHS) if len(one) >= 300]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def likelihoods(backend: str, dtype: str) -> list[float]:
        llm = engine(backend, FULL if backend == "CUSTOM" else None, dtype=dtype)
        outputs = llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
        end(llm)
        return [
            place[token].logprob
            for output, one in zip(outputs, ids, strict=True)
            for place, token in zip(output.prompt_logprobs[1:], one[1:], strict=True)
        ]

    exact = likelihoods("CPU_ATTN", "float32")
    report["tokens"] = len(exact)
    for backend in ("CPU_ATTN", "CUSTOM"):
        values = likelihoods(backend, "bfloat16")
        squares = [(a - b) ** 2 for a, b in zip(values, exact, strict=True)]
        report[backend] = (sum(squares) / len(squares)) ** 0.5


SCENARIOS: dict[str, Callable[[dict[str, Any]], None]] = {
    f.__name__: f for f in (full, pruned, streamed, offloaded, refused, parallel, compiled, reduced)
}


def start_quickly() -> None:
    """Spares engines that start in turn what takes vLLM two thirds of each start: it looks for its
    Triton kernels in every module again, and for garbage among all that was ever imported."""
    from vllm.platforms import current_platform
    from vllm.v1.worker import cpu_worker  # noqa: F401

    platform: Any = current_platform
    platform.register_triton_kernel_overrides = functools.cache(
        platform.register_triton_kernel_overrides
    )
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # engines stay out, and are freed


def main(known: dict[str, Callable[[dict[str, Any]], None]]) -> None:
    """Runs what the command line names."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start_quickly()
    *names, file = sys.argv[1:]
    results: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name, report in results.items():
        known[name](report)
    Path(file).write_text(json.dumps(results))


if __name__ == "__main__":
    sys.modules["engines"] = sys.modules["__main__"]
    import families
    import features

    main(SCENARIOS | families.SCENARIOS | features.SCENARIOS)
