"""What engines answer with keys and values in host memory, as beside a GPU: pool, arena and staging
in the memory of this machine, poisoned, and the reference in place of kernels.

`python hosting.py SCENARIO... FILE` runs scenarios in turn and writes their results as JSON.
"""

from __future__ import annotations

import functools
import json
import os
from typing import Any

import torch
from engines import (
    BLOCK_BYTES,
    NEW,
    PRUNED,
    builder,
    counts,
    end,
    engine,
    main,
    preemptions,
    prompts,
)

from hipserve import HiPConfig, platform
from hipserve.cache import OffloadedLayers, offload
from hipserve.cache.host import PinnedMemory
from hipserve.cache.tiles import row_tiles
from hipserve.offload import slot_bytes
from hipserve.plan import DecodeBuffers

CODED: dict[str, Any] = {**PRUNED, "dense_layers": []}
LAYERS, HEADS, DIM = 12, 2, 64
FLOOR = row_tiles(HiPConfig.from_dict(CODED)) * slot_bytes(HEADS, DIM, 4) * LAYERS
"""Bytes of the smallest arena: a single row reads so much."""


def questions() -> list[list[int]]:
    """Prompts of all lengths, one of which begins with a block of another in the same step."""
    ids = prompts((3, 300, 250, 505, 700))
    return [*ids[:2], ids[1][:256] + ids[4][:20], *ids[2:]]


def as_on_a_gpu() -> None:
    """Tiles instead of a file, computed by the reference."""
    from hipserve.integrations.vllm import limits

    off = platform.NativeLibrary(None, "only the reference has tiles here")
    platform.native_library = lambda: off  # type: ignore[assignment]
    limits.check_offload = lambda *_: None
    tiled = OffloadedLayers._tiled

    def poisoned(*asked: Any) -> Any:
        made: Any = tiled(*asked)
        made._host.fill_(torch.nan)
        made.arena.tiles.fill_(torch.nan)
        for buffer in made._staging._buffers:
            buffer.pages.pages.fill_(torch.nan)
        return made

    OffloadedLayers.make_store = poisoned  # type: ignore[method-assign]
    unpinned: Any = functools.partial(PinnedMemory, pinned=False)
    offload.PinnedMemory = unpinned  # type: ignore[misc]


def answers(llm: Any, ids: list[list[int]]) -> list[list[list[float]]]:
    """Tokens and their log-probabilities, all prompts together."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0)
    asked: Any = [{"prompt_token_ids": one} for one in ids]
    outputs = [out.outputs[0] for out in llm.generate(asked, params, use_tqdm=False)]
    return [
        [[token, step[token].logprob] for token, step in zip(x.token_ids, x.logprobs, strict=True)]
        for x in outputs
    ]


def hosted(report: dict[str, Any]) -> None:
    """The same prompts in the same steps: beside the model, with the smallest arena, with one for
    several rows, and with one whose steps a GPU would replay; then found, and short of blocks."""
    as_on_a_gpu()
    ids = questions()
    llm = engine("CUSTOM", CODED, num_gpu_blocks_override=48)
    report["resident"] = answers(llm, ids)
    report["resident, found"] = answers(llm, ids)
    end(llm)
    for name, device in (("floor", FLOOR), ("room", 7 * FLOOR // 2), ("graphs", 8 * FLOOR)):
        hip = {**CODED, "offload": {"host_memory": 48 * BLOCK_BYTES, "device_memory": device}}
        llm = engine("CUSTOM", hip, num_gpu_blocks_override=48)
        steps = noting(llm, replays=name == "graphs")
        report[name] = answers(llm, ids)
        report[f"{name}, parts"] = max(len(step.parts) or 1 for step in steps)
        report[f"{name}, replayed"] = [step.row_tiles > 0 for step in steps]
        report[f"{name}, found"] = answers(llm, ids)
        report[f"{name}, counts"] = counts(llm)
        report[f"{name}, made again"] = made_again(llm)
        end(llm)
        llm = engine("CUSTOM", hip, num_gpu_blocks_override=6, max_model_len=1024)
        noting(llm, replays=name == "graphs")
        seen = preemptions(llm)
        report[f"{name}, preempted"] = answers(llm, ids)
        report[f"{name}, preemptions"] = len(seen)
        end(llm)


def shared(report: dict[str, Any]) -> None:
    """The same prompts over several workers, TP or PP as the environment says, which divide the
    pool: beside the model, and with the smallest arena on each card."""
    as_on_a_gpu()
    options = json.loads(os.environ["HIPSERVE_TEST_PARALLEL"])
    options |= {"num_gpu_blocks_override": 48, "worker_cls": "hosted_worker.HostedWorker"}
    ids = questions()
    llm = engine("CUSTOM", CODED, **options)
    report["resident"] = answers(llm, ids)
    end(llm)
    sizes = {"host_memory": 48 * BLOCK_BYTES, "device_memory": FLOOR // 2}
    llm = engine("CUSTOM", {**CODED, "offload": sizes}, **options)
    report["offloaded"] = answers(llm, ids)
    report["offloaded, found"] = answers(llm, ids)
    report["counts"] = counts(llm)
    end(llm)


def noting(llm: Any, replays: bool) -> list[Any]:
    """All steps from now on; with replays, those of few single rows as they are on a GPU."""
    made, seen = builder(llm), list[Any]()
    build = made.build
    if replays:
        made.buffers = DecodeBuffers(16, torch.device("cpu"))

    def built(*asked: Any, **named: Any) -> Any:
        seen.append(build(*asked, **named))
        return seen[-1]

    made.build = built
    return seen


def made_again(llm: Any) -> dict[str, Any]:
    """What a second builder shares with the first, and how many slots it takes an arena to have."""
    first = builder(llm)
    asked = first.kv_cache_spec, first.layer_names, first.vllm_config, first.device
    second = type(first)(*asked)
    arenas = [tiled.arena.num_slots for tiled in second.tiled]
    return {
        "counter": second.loads is first.loads,
        "slots": [first.room.slots, second.room.slots, *arenas],
        "layers": len(arenas),
    }


if __name__ == "__main__":
    main({"hosted": hosted, "shared": shared})
