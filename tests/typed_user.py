"""A user's program in strict types: `test_package.py` checks it against the installed package."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hipserve
from hipserve import HiPCache, HiPConfig, HipserveError, hip_attention
from hipserve.errors import ArgumentError, FitError
from hipserve.lab import Document, PerplexityReport, evaluate_perplexity
from hipserve.models import Conversation, Statistics, load
from hipserve.ops import block_sparse_attention, build_index, select_blocks, write_kv
from hipserve.plan import BatchLayout
from hipserve.types import BlockSelection, KeyPool


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q `[batch, query_len, num_q_heads, head_dim]`; k and v with num_kv_heads."""
    out = hip_attention(q, k, v, config=HiPConfig.preset("fast", budget=512))
    assert_type(out, Tensor)
    pair = hip_attention(q, k, v, return_lse=True)
    assert_type(pair, tuple[Tensor, Tensor])
    return out + pair[0]


def attend_pages(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, layout: BatchLayout) -> Tensor:
    """q `[num_tokens, num_q_heads, head_dim]`; k and v with num_kv_heads; slots `[num_tokens]`."""
    pages = torch.empty(8, 256, k.shape[1], k.shape[2])
    pool, index = KeyPool(pages, pages.clone()), build_index(pages)
    write_kv(k, v, pool, index, slots)
    selection = select_blocks(q, index, layout)
    assert_type(selection, BlockSelection)
    out, lse = block_sparse_attention(q, pool, layout, selection)
    assert_type(lse, Tensor)
    return out


def prefill(model: PreTrainedModel, ids: Tensor) -> None:
    hipserve.register(HiPConfig(budget=2048, dense_layers=(0, 1)))
    cache = HiPCache(model.config)
    model(ids, past_key_values=cache)
    assert_type(cache.nbytes, int)


def ask(document: Path) -> str:
    talk = Conversation(load(config=HiPConfig.load("hip.toml"), dtype="float32"))
    talk.say(document.read_text())
    try:
        answer = talk.ask("What is the pass key?", max_new_tokens=8, on_text=print)
    except FitError as error:
        return f"too long: {error}"
    except (ArgumentError, HipserveError) as error:
        raise SystemExit(str(error)) from error
    assert_type(talk.statistics, Statistics | None)
    return answer


def measure() -> dict[str, float]:
    document = Document("book", "books", "text of the book")
    configs = {"dense": None, "hip": HiPConfig()}
    report = evaluate_perplexity(load(), configs, [document], length=4096)
    assert_type(report, PerplexityReport)
    return {"length": report.length}
