"""The translator into transformers: unmodified models, every cache, padding, beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, masking_utils

import hipserve.attention.layer as attention_layer
from hipserve import ArgumentError, HiPCache, hip_attention
from hipserve.attention import selections as attention_selections
from hipserve.cache import pages
from hipserve.integrations import transformers as integration
from hipserve.plan import dense_rows
from hipserve.plan import layout as plan_layout
from tiny_models import FAMILIES, PRUNED, SIZES, build, logits_in_parts, prompts, twins

families = pytest.mark.parametrize("family", FAMILIES)

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
        plan_layout._of_lengths.cache_clear()
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
    select = attention_selections.select_blocks

    def counted(q: torch.Tensor, *args: Any, **options: Any) -> Any:
        calls.append(len(q))
        return select(q, *args, **options)

    monkeypatch.setattr(attention_selections, "select_blocks", counted)
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
        before = [layer.pages.pool.k_cache.data_ptr() for layer in cache.layers]
        for _ in range(5):
            model(ids[:, :1], past_key_values=cache)
    assert before == [layer.pages.pool.k_cache.data_ptr() for layer in cache.layers]


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


@torch.no_grad()
def test_cropping_takes_the_same_tokens_from_every_sequence() -> None:
    model, ids, mask = build("llama"), prompts(2, 60), torch.ones(2, 60)
    mask[0, 50:] = 0
    cache = HiPCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ArgumentError, match="tokens_to_remove: expected columns in which no"):
        cache.crop(-5)
    cache.reset()
    model(ids, attention_mask=mask.flip(1), past_key_values=cache)
    cache.crop(-5)
    assert [layer.pages.lengths for layer in cache.layers] == [[45, 55]] * 3


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


def mask_of(**options: Any) -> Any:
    sizes = {"batch_size": 1, "q_length": 60, "kv_length": 60}
    return integration.describe_mask(**sizes, **options)


def test_only_causal_masks_and_sliding_windows_are_taken_for_such() -> None:
    ids = torch.arange(60)[None] // 30
    packed = masking_utils.packed_sequence_mask_function(ids)
    window = masking_utils.sliding_window_causal_mask_function(24)
    assert mask_of(mask_function=window, local_size=24).sliding_window == 24
    for strange in (
        masking_utils.and_masks(window, packed),
        masking_utils.chunked_causal_mask_function(24, torch.zeros(1, dtype=torch.int)),
    ):
        with pytest.raises(ArgumentError, match="attention_mask: expected a causal or sliding"):
            mask_of(mask_function=strange, local_size=24)
    short = mask_of(attention_mask=torch.ones(1, 30))
    with pytest.raises(ArgumentError, match="attention_mask: expected 60 columns, got 30"):
        short.valid_rows(60, 60, torch.device("cpu"))


def test_a_window_that_only_the_mask_knows_is_kept() -> None:
    """Some models tell their layers' windows to the mask alone; all caches hold to it."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 60, 16)
    k, v = torch.randn(2, 1, 2, 60, 16)
    function = masking_utils.sliding_window_causal_mask_function(24)
    mask = mask_of(mask_function=function, local_size=24)
    module = build("llama", PRUNED).model.layers[0].self_attn
    near = torch.ones(60, 60, dtype=torch.bool).tril().triu(-23)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)
    handles = HiPCache(module.config).layers[0].update(k, v)
    for keys, values in ((k, v), handles):
        out, _ = integration.hip_forward(module, q, keys, values, mask, scaling=0.25)
        torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_causal_inference_is_refused() -> None:
    model = build("llama")
    module = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    with pytest.raises(ArgumentError, match="is_causal: expected True"):
        integration.hip_forward(module, q, k, k, None, is_causal=False)
    loss = model(prompts(), labels=prompts()).loss
    with pytest.raises(ArgumentError, match="no gradient through HiP attention"):
        loss.backward()
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3))
    with pytest.raises(ArgumentError, match="no gradient through HiP attention"):
        hip_attention(q, k, v).sum().backward()


@torch.no_grad()
def test_a_cache_serves_what_it_was_made_for() -> None:
    model, ids = build("llama", {**PRUNED, "selector": "tree"}), prompts(1, 200)
    cache = HiPCache(model.config)
    model(ids, past_key_values=cache)
    model.config.hip = PRUNED
    with pytest.raises(ArgumentError, match=r"past_key_values: expected a HiPCache with summaries"):
        model(ids[:, :1], past_key_values=cache)
    model.config.hip = {**PRUNED, "selector": "tree"}
    with pytest.raises(ArgumentError, match="one whose last step failed half-way"):
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    with pytest.raises(ArgumentError, match="batch: expected the 1 sequences"):
        model(ids, past_key_values=cache) and model(prompts(2, 3), past_key_values=cache)
    cache.reset()
    model(ids, past_key_values=cache)
    cache.crop(-10_000)
    assert cache.get_seq_length() == 0
    for bad in (0, 1.5, 24):
        with pytest.raises(ArgumentError, match="page_size"):
            HiPCache(build("llama", PRUNED).config, page_size=bad)  # pyright: ignore
    wide = {"bound_block_size": 48, "key_block_size": 16, "budget": 96, "num_sink_tokens": 48}
    assert HiPCache(build("llama", wide).config).layers[0].pages.page_size == 768
    with pytest.raises(ArgumentError, match=r"config: expected model\.config"):
        HiPCache(model)


@torch.no_grad()
def test_a_selection_belongs_to_sequences_that_all_have_a_row() -> None:
    """Two rows of one sequence and none of the other are no decode step."""
    model = build("llama", {**PRUNED, "refresh_interval": 4})
    ids, mask = prompts(2, 210), torch.ones(2, 210)
    mask[1, 100:209] = 0
    results: list[torch.Tensor] = []
    for interval in (4, 1):
        model.config.hip = {**PRUNED, "refresh_interval": interval}
        cache = HiPCache(model.config)
        for begin, end in ((0, 207), (207, 209), (209, 210)):
            out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        results.append(out.logits)
    assert torch.equal(*results)


@pytest.mark.parametrize(("length", "dense_below"), [(40, 64), (150, 64), (100, 100)])
def test_a_head_by_torch_leaves_output_and_counts_alone(
    length: int, dense_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does with the first rows of a prompt, here with torch's kernels for CPUs."""
    hip = {**PRUNED, "dense_below": dense_below, "dense_layers": [1]}
    model, ids = build("llama", hip), prompts(2, length)

    def run() -> tuple[torch.Tensor, tuple[float, float]]:
        cache = HiPCache(model.config)
        return model(ids, past_key_values=cache).logits, cache.count_keys()

    def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        rows = dense_rows(options["rule"], q.shape[1])
        heads = (x[:, :rows].transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(
            *heads, is_causal=True, scale=options["sm_scale"], enable_gqa=True
        )
        return out.transpose(1, 2)

    expected, counts = run()
    monkeypatch.setattr(attention_layer, "dense_head", by_torch)
    out, counts_by_torch = run()
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert counts_by_torch == counts
