"""Scenarios of requests that are not greedy text alone, as those of `engines.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from engines import FULL, answers, end, engine, preemptions, prompts
from safetensors.torch import save_file

LENGTHS = (3, 65, 257, 345, 700)
SMALL = {"kv_cache_memory_bytes": 1 << 27, "max_model_len": 2048, "max_num_seqs": 8}
HEADS = {"q_proj": 512, "v_proj": 128}
"""Matrices of the bundled model that the adapter changes, and their rows; 384 columns each."""


def adapter() -> str:
    """A random LoRA adapter of the bundled model; its path."""
    from hipserve.models import bundled_path

    path = Path(os.environ["HIPSERVE_TEST_MODELS"], "adapter")
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{part}.weight": 0.1
        * torch.randn(*shape)
        for layer in range(12)
        for name, rows in HEADS.items()
        for part, shape in (("A", (8, 384)), ("B", (rows, 8)))
    }
    save_file(weights, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16}
    settings |= {"target_modules": list(HEADS), "bias": "none"}
    settings |= {"base_model_name_or_path": str(bundled_path())}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return str(path)


def asked(backend: str, hip: dict[str, Any] | None) -> dict[str, Any]:
    """Log-probabilities, seeded samples and beams with one attention."""
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    llm = engine(backend, hip, **SMALL)
    ids = [{"prompt_token_ids": one} for one in prompts(LENGTHS)]
    told, many = (
        llm.generate(ids, wanted, use_tqdm=False)
        for wanted in (
            SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=0),
            SamplingParams(temperature=0.8, seed=7, n=3, max_tokens=8),
        )
    )
    beams = llm.beam_search(ids[:3], BeamSearchParams(beam_width=3, max_tokens=6))
    end(llm)
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in told],
        "likeliest": [[sorted(step) for step in one.outputs[0].logprobs] for one in told],
        "prompt": [
            place[token].logprob
            for one in told
            for place, token in zip(one.prompt_logprobs[1:], one.prompt_token_ids[1:], strict=True)
        ],
        "samples": [[list(sample.token_ids) for sample in one.outputs] for one in many],
        "beams": [[list(beam.tokens) for beam in one.sequences] for one in beams],
    }


def adapted(backend: str, hip: dict[str, Any] | None) -> dict[str, Any]:
    """Answers without an adapter and with one, one by one."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm = engine(backend, hip, **SMALL, enable_lora=True, max_lora_rank=8)
    wanted = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    found: dict[str, Any] = {}
    for name, lora in (("plain", None), ("adapter", LoRARequest("x", 1, adapter()))):
        found[name] = [
            list(output.outputs[0].token_ids)
            for one in prompts(LENGTHS)
            for output in llm.generate(
                {"prompt_token_ids": one}, wanted, use_tqdm=False, lora_request=lora
            )
        ]
    end(llm)
    return found


def prioritised(ids: list[list[int]]) -> dict[str, Any]:
    """The last prompt is the most urgent, in a cache that does not hold them all."""
    from vllm import SamplingParams

    options = {**SMALL, "num_gpu_blocks_override": 9, "scheduling_policy": "priority"}
    llm = engine("CUSTOM", FULL, **options)
    seen, wanted = preemptions(llm), SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": one} for one in ids],
        wanted,
        use_tqdm=False,
        priority=list(range(len(ids), 0, -1)),
    )
    end(llm)
    return {"answers": [list(x.outputs[0].token_ids) for x in outputs], "preemptions": len(seen)}


def embedded(backend: str, hip: dict[str, Any] | None) -> dict[str, list[float]]:
    llm = engine(backend, hip, **SMALL, runner="pooling", convert="embed")
    ids = [{"prompt_token_ids": one} for one in prompts(LENGTHS)]
    found = [x for one in llm.embed(ids, use_tqdm=False) for x in one.outputs.embedding]
    end(llm)
    return {"embeddings": found}


def features(report: dict[str, Any]) -> None:
    """Room for every key, beside vLLM's own attention."""
    for name, backend, hip in (("dense", "CPU_ATTN", None), ("full", "CUSTOM", FULL)):
        report[name] = asked(backend, hip) | adapted(backend, hip) | embedded(backend, hip)
    ids = prompts((250, 506, 510, 1018, 505, 760))  # answers begin another block
    llm = engine("CPU_ATTN", **SMALL)
    report["in any order"] = answers(llm, ids)
    end(llm)
    report["prioritised"] = prioritised(ids)


SCENARIOS = {"features": features}
