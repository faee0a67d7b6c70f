"""Caches whose mask changes, with padding between tokens, or a failed step: right or refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hipserve import ArgumentError, HiPCache, HiPConfig, register
from hipserve.attention import layer as attention_layer
from hipserve.attention import selections
from hipserve.integrations.transformers import forward
from tiny_models import PRUNED, build, prompts, twins

OTHER_MASK = "attention_mask: expected a mask that hides of the 60 cached keys those that it hid"
FAILED = "expected a HiPCache whose steps all ended"
UNPADDED = torch.ones(2, 60, dtype=torch.long)


def padded(*holes: tuple[int, int, int], length: int = 60) -> Tensor:
    """`[2, length]`: a mask that hides columns [begin, end) of some rows."""
    mask = torch.ones(2, length, dtype=torch.long)
    for row, begin, end in holes:
        mask[row, begin:end] = 0
    return mask


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (padded(), padded((0, 0, 20))),
        (padded(), padded((1, 30, 31))),
        (padded((0, 0, 20)), padded()),
        (padded((0, 0, 20)), padded((0, 0, 21))),
        (padded((0, 0, 20)), padded((1, 0, 20))),
        (padded((0, 0, 20)), None),
    ],
)
@torch.no_grad()
def test_another_mask_over_cached_keys_is_refused(first: Tensor, then: Tensor | None) -> None:
    model, ids = build("llama"), prompts(2, 64)
    cache = HiPCache(model.config)
    model(ids[:, :60], attention_mask=first, past_key_values=cache)
    whole = None if then is None else torch.cat([then, UNPADDED[:, :4]], dim=1)
    with pytest.raises(ArgumentError, match=OTHER_MASK):
        model(ids[:, 60:], attention_mask=whole, past_key_values=cache)
    with pytest.raises(ArgumentError, match=FAILED):  # the step failed half-way
        model(ids[:, 60:], past_key_values=cache)


@torch.no_grad()
def test_a_prefix_hidden_for_generate_is_refused() -> None:
    model, ids = build("llama"), prompts(2, 90)
    cache = HiPCache(model.config)
    model(ids[:, :60], past_key_values=cache)
    mask = padded((0, 0, 40), length=90)
    with pytest.raises(ArgumentError, match=OTHER_MASK):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("family", ["llama", "mistral windowed", "gemma3"])
@torch.no_grad()
def test_turns_of_a_padded_batch_equal_sdpa(family: str) -> None:
    """Padding between turns: windows count its columns, in prefill, chunks and decode alike."""
    model, dense = twins(family)
    ids = prompts(2, 100)
    mask = padded((0, 0, 9), (0, 50, 70), (1, 80, 85), length=100)
    for edges in ([0, 100], [0, 50, 99, 100], [0, 64, 98, 99, 100]):
        for make in (HiPCache, lambda config: DynamicCache(config=config)):
            got, expected = (
                logits(m, ids, mask, edges, make(model.config)) for m in (model, dense)
            )
            kept = mask.bool()
            torch.testing.assert_close(got[kept], expected[kept], atol=2e-3, rtol=1e-3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got, expected = (
        m(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for m in (model, dense)
    )
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=2e-3, rtol=1e-3)


def logits(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, edges: list[int], cache: Any
) -> Tensor:
    """With a HiPCache only for "hip": sdpa gets transformers' own."""
    if model.config._attn_implementation != "hip":
        cache = DynamicCache(config=model.config)
    parts = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in itertools.pairwise(edges)
    ]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_padding_inside_a_window_over_pages_is_refused() -> None:
    """Some models tell their layers' windows to the mask alone; pages hold no padding."""
    module = build("llama").model.layers[0].self_attn
    q, k = torch.randn(2, 4, 60, 16), torch.randn(2, 2, 60, 16)
    for mask, refused in ((padded((0, 0, 20)), False), (padded((0, 20, 30)), True)):
        handles = HiPCache(module.config).layers[0].update(k, k)
        described = forward.MaskDescription(2, 60, 60, 0, 0, 24, mask)
        if refused:
            with pytest.raises(ArgumentError, match="attention_mask: expected padding at the ends"):
                forward.hip_forward(module, q, *handles, described, scaling=0.25)
        else:
            forward.hip_forward(module, q, *handles, described, scaling=0.25)


class Interrupt(BaseException):
    pass


def fail(*_: Any, **__: Any) -> Any:
    raise Interrupt


def interrupted(model: PreTrainedModel, place: str, ids: Tensor, cache: Any) -> None:
    """A step that ends where `place` says, as a KeyboardInterrupt or an error may end it."""
    layers = model.model.layers
    module = {"mlp": layers[0].mlp, "last": layers[2].self_attn.o_proj}.get(place)
    owner = selections if place == "select_blocks" else attention_layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module or owner, "forward" if module else place, fail)
        with pytest.raises(Interrupt):
            model(ids, past_key_values=cache)


ALWAYS = ("mlp", "select_blocks", "attend_chosen")
PLACES = [*itertools.product(ALWAYS, (0, 200)), ("dense_head", 0)]


@pytest.mark.parametrize(("place", "held"), PLACES)
@torch.no_grad()
def test_a_step_that_fails_between_layers_ends_its_cache(place: str, held: int) -> None:
    model, ids = build("llama", {**PRUNED, "dense_layers": [0]}), prompts(1, 300)
    cache = HiPCache(model.config)
    if held:
        model(ids[:, :held], past_key_values=cache)
    interrupted(model, place, ids[:, held:250], cache)
    for attempt in (ids[:, held:250], ids[:, 250:251], ids[:, 250:300]):
        with pytest.raises(ArgumentError, match=FAILED):
            model(attempt, past_key_values=cache)
    with pytest.raises(ArgumentError, match=FAILED):
        cache.crop(-10)
    cache.reset()
    fresh = model(ids, past_key_values=HiPCache(model.config)).logits
    assert torch.equal(model(ids, past_key_values=cache).logits, fresh)


@torch.no_grad()
def test_a_batch_that_pages_refuse_ends_the_cache_of_one_layer_too() -> None:
    model, ids = build("llama"), prompts(2, 60)
    cache = HiPCache(model.config)
    model(ids[:1], past_key_values=cache)
    with pytest.raises(ArgumentError, match="batch: expected the 1 sequences"):
        model(ids[:, :3], past_key_values=cache)
    layer = cache.layers[0]
    with pytest.raises(ArgumentError, match=FAILED):
        layer.update(*torch.randn(2, 1, 2, 3, 16))


@torch.no_grad()
def test_a_failed_step_ends_transformers_own_cache_too() -> None:
    model, ids = build("llama"), prompts(1, 300)
    cache = DynamicCache(config=model.config)
    model(ids[:, :200], past_key_values=cache)
    interrupted(model, "mlp", ids[:, 200:250], cache)
    with pytest.raises(ArgumentError, match="past_key_values: expected 251 keys in every layer"):
        model(ids[:, 250:251], past_key_values=cache)


@torch.no_grad()
def test_a_step_that_fails_behind_attention_leaves_a_cache_that_read_it() -> None:
    model, ids = build("llama", PRUNED), prompts(1, 300)
    cache = HiPCache(model.config)
    interrupted(model, "last", ids[:, :256], cache)
    expected = model(ids, past_key_values=HiPCache(model.config)).logits[:, 256:]
    got = model(ids[:, 256:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_what_a_cache_knows_of_padding_follows_beams_and_crops() -> None:
    model, dense = twins("llama")
    ids, mask = prompts(2, 60), padded((0, 0, 20))
    cache = HiPCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0, 0]))
    order = [1, 0, 0]
    more = torch.cat([mask[order], torch.ones(3, 1, dtype=torch.long)], dim=1)
    got = model(ids[order, :1], attention_mask=more, past_key_values=cache).logits
    whole = torch.cat([ids[order], ids[order, :1]], dim=1)
    expected = dense(whole, attention_mask=more).logits[:, -1:]
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
    cache.crop(-31)
    got = model(ids[order, 30:], attention_mask=mask[order], past_key_values=cache).logits
    expected = dense(ids[order], attention_mask=mask[order]).logits[:, 30:]
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_a_registered_configuration_is_for_models_that_carry_none() -> None:
    """For the attention and for the pages; registering without one keeps it."""
    carries, plain, ids = build("llama", PRUNED), build("llama"), prompts(1, 200)
    expected = carries(ids, past_key_values=HiPCache(carries.config)).logits
    dense = plain(ids, past_key_values=HiPCache(plain.config)).logits
    assert not torch.equal(expected, dense)
    try:
        register(HiPConfig.from_dict({**PRUNED, "selector": "tree"}))
        assert HiPCache(plain.config).layers[0].pages.form.run_size is None
        assert HiPCache(carries.config).layers[0].pages.form.run_size == 16
        register(HiPConfig.from_dict(PRUNED))
        register()
        assert torch.equal(plain(ids, past_key_values=HiPCache(plain.config)).logits, expected)
    finally:
        register(HiPConfig())
    assert torch.equal(plain(ids, past_key_values=HiPCache(plain.config)).logits, dense)
