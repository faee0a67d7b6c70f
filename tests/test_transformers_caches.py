"""Caches that are copied, saved, static or passed to assisted generation: as with sdpa."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hipserve import HiPCache, HiPConfig, hip_attention
from tiny_models import PRUNED, build, prompts, twins


@pytest.mark.parametrize("family", ["llama", "mistral windowed"])
def test_a_static_cache_gives_what_sdpa_gives(family: str) -> None:
    model, dense = twins(family)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    options["disable_compile"] = True
    assert torch.equal(model.generate(prompts(2), **options), dense.generate(prompts(2), **options))


@torch.no_grad()
def test_copies_of_a_cache_go_on_by_themselves(tmp_path: Path) -> None:
    """Deep copies, as for a prompt that several questions share, and files."""
    model, ids = build("llama", PRUNED), prompts(1, 300)
    cache = HiPCache(model.config)
    model(ids[:, :250], past_key_values=cache)
    torch.save(cache, tmp_path / "cache.pt")
    copies = [copy.deepcopy(cache), torch.load(tmp_path / "cache.pt", weights_only=False)]
    expected = model(ids[:, 250:], past_key_values=cache).logits
    for one in copies:
        assert one.get_seq_length() == 250
        assert torch.equal(model(ids[:, 250:], past_key_values=one).logits, expected)


def test_assisted_generation_takes_a_cache() -> None:
    model, dense = twins("llama")
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = dense.generate(prompts(), **options)
    cache = HiPCache(model.config)
    got = model.generate(prompts(), past_key_values=cache, assistant_model=dense, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [1e4, 1e6])
def test_large_scores_are_those_of_sdpa(size: float) -> None:
    """Every row of the largest scores that a model might reach reads its best key."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 100, 2, 64) for _ in range(3))
    q = q * (size / (q @ k.mT).abs().max()) * 8
    out = hip_attention(q, k, v, config=HiPConfig(budget=1 << 15))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    expected = scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=1e-3)
