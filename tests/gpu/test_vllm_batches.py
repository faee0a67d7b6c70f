"""vLLM on a card, as it runs there by default (CUDA graphs): a batch answers as each request alone.

The bundled model, since random weights in bfloat16 cannot show it: which keys a search finds among
equally good ones is decided by rounding, and rounding depends on the size of a batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hipserve.lab.quality.tasks import PASS_KEY_QUESTION, pass_key, plant
from hipserve.lab.text import language_reference
from hipserve.models import bundled_path

pytest.importorskip("vllm")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

COUNT, CHARACTERS = 8, 96_000
KEYS = [str(71834 + 1013 * i) for i in range(COUNT)]
TOLERANCE = 0.1
"""Of the log-probability of an answer's tokens on average: bfloat16 through 12 layers."""


def conversations() -> list[list[dict[str, str]]]:
    """Some 25,000 tokens each, of which a step reads less than a tenth."""
    text, rng = language_reference(), random.Random(0)
    made = []
    for key in KEYS:
        begin = rng.randrange(len(text) - CHARACTERS)
        document = plant(text[begin : begin + CHARACTERS], [pass_key(key)], [rng.random()])
        contents = (document, PASS_KEY_QUESTION)
        made.append([{"role": "user", "content": content} for content in contents])
    return made


@pytest.fixture(scope="module", params=["auto", "fp8"])
def engine(request: pytest.FixtureRequest) -> Any:
    """With keys and values as the model computes them, and in fp8."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    return LLM(
        str(bundled_path()),
        dtype="bfloat16",
        attention_backend="CUSTOM",
        max_model_len=65536,
        max_num_seqs=16,
        gpu_memory_utilization=0.3,
        kv_cache_dtype=request.param,
        enable_prefix_caching=False,
    )


def answers(engine: Any, asked: Sequence[list[dict[str, str]]]) -> list[tuple[str, list[float]]]:
    """Texts, and the log-probabilities of their tokens."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=24, logprobs=0)
    found = []
    for output in engine.chat(list(asked), greedy, use_tqdm=False):
        (one,) = output.outputs
        steps = zip(one.token_ids, one.logprobs, strict=True)
        found.append((one.text, [step[token].logprob for token, step in steps]))
    return found


def test_a_batch_answers_as_each_request_alone(engine: Any) -> None:
    asked = conversations()
    alone = [answers(engine, [one])[0] for one in asked]
    together = answers(engine, asked)
    for key, (text, chances), (other, others) in zip(KEYS, alone, together, strict=True):
        assert key in text
        assert text == other
        apart = [abs(a - b) for a, b in zip(chances, others, strict=True)]
        assert sum(apart) / len(apart) < TOLERANCE, (text, apart)
