"""How engines schedule, sample, constrain and speculate, in a process of their own.

`python schedules.py SCENARIO... FILE` runs scenarios in turn and writes their results as JSON.
"""

from __future__ import annotations

from typing import Any

from engines import FULL, NEW, PRUNED, answers, core, end, engine, main, prompts

ALIGNED = {**PRUNED, "query_block_size": 64, "refresh_interval": 1}
LENGTHS = (3, 257, 700, 1024, 1100, 1500)
ASYNCHRONOUS = "hipserve.integrations.vllm.scheduler.AsyncQueryBlockScheduler"


def seeded(llm: Any, ids: list[list[int]]) -> list[list[int]]:
    """Sampled answers, a seed for each prompt."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=1, seed=seed, max_tokens=NEW, ignore_eos=True)
        for seed in range(len(ids))
    ]
    outputs = llm.generate([{"prompt_token_ids": x} for x in ids], params, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outputs]


def company(report: dict[str, Any]) -> None:
    """Prompts whole and one by one; then in chunks and together, with both schedulers."""
    ids = prompts(LENGTHS)
    whole = {"max_num_seqs": 1, "max_num_batched_tokens": 4096, "enable_prefix_caching": False}
    llm = engine("CUSTOM", ALIGNED, **whole)
    report["alone"], report["alone, seeded"] = answers(llm, ids), seeded(llm, ids)
    report["by default"] = type(core(llm).scheduler).__name__
    end(llm)
    llm = engine("CUSTOM", ALIGNED, scheduler_cls=ASYNCHRONOUS)
    report["asynchronous"] = [cls.__name__ for cls in type(core(llm).scheduler).__mro__]
    report["together, seeded"] = seeded(llm, ids)
    report["hits, seeded"] = seeded(llm, ids)
    llm.reset_prefix_cache()
    report["together"], report["hits"] = answers(llm, ids), answers(llm, ids)
    end(llm)
    little = {"max_num_batched_tokens": 70, "max_num_seqs": 16, "long_prefill_token_threshold": 32}
    llm = engine("CUSTOM", ALIGNED, **little)
    report["small steps"] = answers(llm, ids)
    end(llm)


def constrained(report: dict[str, Any]) -> None:
    """Structured outputs of every kind, and answers with and without ngram speculation."""
    ids = prompts(LENGTHS)
    llm = engine("CUSTOM", FULL)
    report["expected"] = answers(llm, ids)
    for kind, form in FORMS.items():
        report[kind] = structured(llm, **form)
    end(llm)
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    llm = engine("CUSTOM", FULL, speculative_config=ngram)
    report["ngram"] = answers(llm, ids)
    end(llm)


SCHEMA = {
    "type": "object",
    "properties": {"key": {"type": "integer", "maximum": 99999}},
    "required": ["key"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, Any]] = {
    "json": {"json": SCHEMA},
    "choice": {"choice": ["north", "south"]},
    "regex": {"regex": r"[0-9]{3}-[0-9]{4}"},
    "grammar": {"grammar": 'root ::= "yes" | "no"'},
}


def structured(llm: Any, **form: Any) -> str:
    """An answer that has to have a form."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    constraint = StructuredOutputsParams(**form)
    params = SamplingParams(temperature=0, max_tokens=64, structured_outputs=constraint)
    return llm.generate(["The key is 83724. The key:"], params, use_tqdm=False)[0].outputs[0].text


if __name__ == "__main__":
    main({"company": company, "constrained": constrained})
