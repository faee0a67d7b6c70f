"""Scenarios of models that are not plain Llamas, as those of `engines.py`."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoints
from engines import FULL, answers, counts, end, engine, prompts, runner

from hipserve.config import DEFAULT
from hipserve.integrations.vllm import kv_block
from hipserve.ops.write_kv.reference import moments

LENGTHS = (3, 65, 257, 345, 700, 1100)
SMALL = {"kv_cache_memory_bytes": 1 << 27, "max_model_len": 2048, "max_num_seqs": 8}
PRUNED = {
    "budget": 64,
    "num_sink_tokens": 16,
    "sliding_window": 64,
    "query_block_size": 32,
    "dense_below": 0,
}


def folder() -> Path:
    return Path(os.environ["HIPSERVE_TEST_MODELS"])


def tiny(name: str, backend: str, hip: dict[str, Any] | None = None, **options: Any) -> Any:
    model = checkpoints.make(name, folder())
    return engine(backend, hip, model=model, **{**SMALL, **options})


def cache_of(llm: Any) -> dict[str, int]:
    """Tokens of a KV block, and blocks."""
    cache = llm.llm_engine.vllm_config.cache_config
    return {"block": cache.block_size, "blocks": cache.num_gpu_blocks}


def beside_dense(name: str, **options: Any) -> dict[str, Any]:
    """Answers of vLLM's own attention, of HiP with room for every key, and of HiP twice, pruned."""
    ids, seen = prompts(LENGTHS), {}
    for key, backend, hip in (("dense", "CPU_ATTN", None), ("full", "CUSTOM", FULL)):
        llm = tiny(name, backend, hip, **options)
        seen[key], seen[f"{key} cache"] = answers(llm, ids), cache_of(llm)
        end(llm)
    return seen


def families(report: dict[str, Any]) -> None:
    """Room for every key, beside vLLM's own attention."""
    for name in ("granite", "llama4", "gptoss", "gemma2", "gemma3", "mistral"):
        report[name] = beside_dense(name)
    report["gemma3n"] = beside_dense("gemma3n", kv_sharing_fast_prefill=True)


def hybrids(report: dict[str, Any]) -> None:
    """Models with recurrent layers, their answers and how much of the KV cache is attention's.

    vLLM's kernels for CPUs keep no states of Mamba layers between the blocks of a prompt, which
    prefix hits would ask for, and compute Qwen3-Next in bfloat16 only.
    """
    report["qwen3next_wide"] = beside_dense("qwen3next_wide", dtype="bfloat16")
    for name in ("granite_hybrid", "falcon_h1"):
        report[name] = beside_dense(name, enable_prefix_caching=False)


@contextmanager
def watching_bounds() -> Iterator[dict[str, int]]:
    """Counts the whole runs behind the sequences of every step, and those with wrong bounds."""
    from hipserve.integrations.vllm.layer import HiPImpl

    seen, forward = {"runs": 0, "wrong": 0}, HiPImpl.forward

    def watched(impl: Any, layer: Any, *tensors: Any, **more: Any) -> Any:
        result = forward(impl, layer, *tensors, **more)
        kv_cache, step = tensors[3], tensors[4]
        if step is not None and impl.keeps_index(layer):
            compare_bounds(kv_cache, step.plan.layout, seen)
        return result

    HiPImpl.forward = watched
    try:
        yield seen
    finally:
        HiPImpl.forward = forward


def compare_bounds(kv_cache: Any, layout: Any, seen: dict[str, int]) -> None:
    pages = kv_block.page_views(kv_cache, DEFAULT.index_form)
    assert pages.index.summaries is not None
    for table, length in zip(layout.block_table, layout.seq_lens.tolist(), strict=True):
        used = table[: -(-length // pages.index.page_size)].long()
        keys = pages.pool.k_cache[used].flatten(0, 1)[None, : length // 16 * 16]
        expected = moments(keys[0].unflatten(0, (length // 16, 16)), dim=1).to(keys.dtype)
        found = pages.index.summaries[used, : pages.index.page_size // 16].flatten(0, 1)[
            : length // 16
        ]
        seen["runs"] += length // 16
        if length >= 16:
            seen["wrong"] += int((found != expected).flatten(1).any(1).sum())


def partial_hits(report: dict[str, Any]) -> None:
    """A hit inside a block: vLLM copies the block, without what lies behind its keys."""
    (prompt,) = prompts((1400,))
    options = {"enable_prefix_caching": True, "mamba_cache_mode": "align", "prefix_match_unit": 64}
    llm = tiny("qwen3next", "CUSTOM", PRUNED, dtype="bfloat16", block_size=256, **options)
    with watching_bounds() as seen, counting_copies() as copies:
        answers(llm, [prompt[:1100]])
        answers(llm, [prompt])
    report["partial hits"] = {**seen, "copies": len(copies), **cache_of(llm)}
    report["partial hits"]["found"] = counts(llm)["hipserve_found_keys"]
    end(llm)


@contextmanager
def counting_copies() -> Iterator[list[int]]:
    from vllm.v1.worker import gpu_model_runner

    seen: list[int] = []
    runner: Any = gpu_model_runner
    copy = runner.copy_kv_cache_blocks_inplace

    def counted(caches: Any, count: int, copies: Any) -> None:
        seen.extend([1] * len(copies))
        copy(caches, count, copies)

    runner.copy_kv_cache_blocks_inplace = counted
    try:
        yield seen
    finally:
        runner.copy_kv_cache_blocks_inplace = copy


def connector(report: dict[str, Any]) -> None:
    """Prompts in turn, in a cache that holds one: their blocks come back from host memory."""
    ids = prompts((1100, 900, 1000))
    pool = {"num_gpu_blocks_override": 24, "block_size": 64, "max_model_len": 1300}
    llm = engine("CUSTOM", PRUNED, **{**SMALL, **pool}, enable_prefix_caching=False)
    report["without connector"] = answers(llm, ids, together=False)
    report["freed"] = freed_by_teardown(llm)
    end(llm)
    extra = {"cpu_bytes_to_use": 1 << 27, "spec_name": "HostSpec", "spec_module_path": "offloading"}
    transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    transfer["kv_connector_extra_config"] = extra
    llm = engine("CUSTOM", PRUNED, **{**SMALL, **pool}, kv_transfer_config=transfer)
    with watching_bounds() as seen:
        report["first"] = answers(llm, ids, together=False)
        report["again"] = answers(llm, ids, together=False)
    report["connector"] = {**seen, "found": counts(llm)["hipserve_found_keys"]}
    end(llm)


def freed_by_teardown(llm: Any) -> bool:
    """vLLM's own steps after it has measured CUDA graphs free the storage of the KV cache."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from vllm.v1.worker.utils import clear_layer_kv_caches

    worker = runner(llm)
    layers = worker.compilation_config.static_forward_context
    held = StorageWeakRef(next(iter(layers.values())).kv_cache.untyped_storage())
    worker.kv_caches.clear()
    worker.attn_groups.clear()
    clear_layer_kv_caches(layers.values())
    del worker.kv_cache_config
    gc.collect()
    return held.expired()


def found(report: dict[str, Any]) -> None:
    """Keys that requests find computed, by copies and by a connector."""
    partial_hits(report)
    connector(report)


SCENARIOS = {f.__name__: f for f in (families, hybrids, found)}
