"""The translator into transformers: unmodified models, every cache, padding, beams."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import hipserve.attention.layer as attention_layer
import hipserve.integrations.transformers as integration
from hipserve import ArgumentError, HiPCache, types
from hipserve.attention.dense import dense_rows
from hipserve.cache import pages

PRUNED = {
    "budget": 32,
    "num_sink_tokens": 16,
    "sliding_window": 16,
    "query_block_size": 16,
    "dense_below": 0,
    "refresh_interval": 1,
}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral windowed": ("MistralConfig", {"sliding_window": 24}),
    "gemma2": ("Gemma2Config", {"sliding_window": 24, "attn_logit_softcapping": 20.0}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 24}),
}
families = pytest.mark.parametrize("family", FAMILIES)


def build(
    family: str, hip: dict[str, Any] | None = None, attention: str = "hip"
) -> PreTrainedModel:
    torch.manual_seed(3)
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **extra})
    if hip is not None:
        config.hip = hip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval()


def twins(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights under "hip" with room for everything, and under "sdpa" (or eager)."""
    model = build(family)
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    return model, dense


def prompts(batch: int = 1, length: int = 90) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(5))


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 32},
}


@families
@pytest.mark.parametrize("option", OPTIONS)
def test_generates_what_sdpa_generates(family: str, option: str) -> None:
    model, dense = twins(family)
    options = {"max_new_tokens": 12, "do_sample": False, **OPTIONS[option]}
    ids = prompts(2)
    torch.manual_seed(1)
    expected = dense.generate(ids, **options)
    for cache in ({"past_key_values": HiPCache(model.config)}, {}):
        torch.manual_seed(1)
        assert torch.equal(model.generate(ids, **options, **cache), expected)


class Waits(TorchFunctionMode):
    """Counts what a GPU's host would wait for: values read back, tensors made of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = (torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.item, torch.Tensor.tolist)
        self.count += func in (torch.tensor, *read)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", [0, 7])
def test_a_step_waits_no_longer_with_more_layers(
    monkeypatch: pytest.MonkeyPatch, padding: int
) -> None:
    counts: list[int] = []
    for layers in (2, 6):
        monkeypatch.setitem(SIZES, "num_hidden_layers", layers)
        model, ids = build("llama", PRUNED), prompts(2)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        cache = HiPCache(model.config)
        pages._few_slots.cache_clear()
        types._of_lengths.cache_clear()
        with torch.no_grad():
            model(ids[:, :-2], past_key_values=cache, attention_mask=mask[:, :-2])
            model(ids[:, -2:-1], past_key_values=cache, attention_mask=mask[:, :-1])
            with Waits() as waits:
                model(ids[:, -1:], past_key_values=cache, attention_mask=mask)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


@families
def test_left_padded_batches(family: str) -> None:
    model, dense = twins(family)
    ids = prompts(3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 17, 60)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = dense.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    cache = HiPCache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)


@families
def test_logits_with_and_without_a_cache(family: str) -> None:
    model, dense = twins(family)
    ids = prompts()
    with torch.no_grad():
        expected = dense(ids).logits
        torch.testing.assert_close(
            model(ids, use_cache=False).logits, expected, atol=2e-3, rtol=1e-3
        )
        paged = model(ids, past_key_values=HiPCache(model.config)).logits
    torch.testing.assert_close(paged, expected, atol=2e-3, rtol=1e-3)


def logits_in_parts(model: PreTrainedModel, ids: torch.Tensor, edges: list[int], cache: Any):
    with torch.no_grad():
        parts = [
            model(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(edges)
        ]
    return torch.cat(parts, dim=1)


def test_pruned_chunks_equal_one_pass_and_plain_tensors() -> None:
    model, ids = build("llama", PRUNED), prompts(2, 300)
    dense = build("llama", {**PRUNED, "dense_below": 10_000})
    one = logits_in_parts(model, ids, [0, 300], HiPCache(model.config))
    cut = logits_in_parts(model, ids, [0, 64, 160, 288, 300], HiPCache(model.config))
    torch.testing.assert_close(cut, one, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        torch.testing.assert_close(plain, one, atol=2e-4, rtol=1e-4)
        assert (one - dense(ids, use_cache=False).logits).abs().max() > 0.1, "nothing was pruned"


def selections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Query rows of every selection made from now on."""
    calls: list[int] = []
    select = attention_layer.select_blocks

    def counted(q: torch.Tensor, *args: Any, **options: Any) -> Any:
        calls.append(len(q))
        return select(q, *args, **options)

    monkeypatch.setattr(attention_layer, "select_blocks", counted)
    return calls


def test_selections_are_shared_by_refresh_interval_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = selections(monkeypatch)
    model = build("llama", {**PRUNED, "refresh_interval": 4})
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    model.generate(prompts(1, 200), past_key_values=HiPCache(model.config), **options)
    layers = model.config.num_hidden_layers
    assert calls.count(200) == layers
    assert calls.count(1) == 3 * layers  # 9 decode steps, four to a selection


def test_dense_layers_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = selections(monkeypatch)
    model = build("llama", {**PRUNED, "dense_layers": 2})
    with torch.no_grad():
        model(prompts(1, 200), past_key_values=HiPCache(model.config))
    assert len(calls) == 1


def test_a_decode_step_copies_no_cache() -> None:
    model, cache = build("llama", PRUNED), None
    cache = HiPCache(model.config)
    ids = prompts(1, 200)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = [layer.pages.pages.k_cache.data_ptr() for layer in cache.layers]
        for _ in range(5):
            model(ids[:, :1], past_key_values=cache)
    assert before == [layer.pages.pages.k_cache.data_ptr() for layer in cache.layers]


def test_crop_and_reset() -> None:
    model, ids = build("llama", PRUNED), prompts(1, 200)
    cache = HiPCache(model.config)
    whole = logits_in_parts(model, ids, [0, 160, 200], cache)
    cache.crop(-40)
    again = logits_in_parts(model, ids[:, 160:], [0, 40], cache)
    assert torch.equal(again, whole[:, 160:])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits_in_parts(model, ids, [0, 160, 200], cache), whole)


def test_settings_travel_with_the_model(tmp_path: Any) -> None:
    model = build("llama", PRUNED)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hip")
    assert loaded.config.hip["budget"] == 32
    loaded(prompts())
    loaded.config.hip["budget"] = 8  # in place: settings are read again
    with pytest.raises(ArgumentError, match="budget"):
        loaded(prompts())
    loaded.config.hip = {"budgte": 3}
    with pytest.raises(ArgumentError, match="budgte"):
        loaded(prompts())


def test_refusals() -> None:
    model = build("llama", attention="sdpa")
    with pytest.raises(ArgumentError, match="HiPCache goes with"):
        model(prompts(), past_key_values=HiPCache(model.config))
    model.set_attn_implementation("hip")
    with pytest.raises(ArgumentError, match="attention_mask"):
        model(prompts(), attention_mask=torch.ones(1, 1, 90, 90))


@pytest.mark.parametrize("length", [40, 150])
def test_a_head_by_torch_leaves_output_and_counts_alone(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does with the first rows of a prompt, here with torch's kernels for CPUs."""
    hip = {**PRUNED, "dense_below": 64, "dense_layers": [1]}
    model, ids = build("llama", hip), prompts(2, length)

    def run() -> tuple[torch.Tensor, tuple[float, float]]:
        cache = HiPCache(model.config)
        return model(ids, past_key_values=cache).logits, cache.count_keys()

    def by_torch(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Any, **options: Any
    ) -> torch.Tensor:
        rows = dense_rows(config, q.shape[1])
        heads = (x[:, :rows].transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(
            *heads, is_causal=True, scale=options["sm_scale"], enable_gqa=True
        )
        return out.transpose(1, 2)

    expected, counts = run()
    monkeypatch.setattr(integration, "dense_head", by_torch)
    out, counts_by_torch = run()
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert counts_by_torch == counts
