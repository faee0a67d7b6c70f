"""Captured decode steps: the same results as steps that the host runs, and nothing left to it."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.tiny_models import PRUNED, build, twins
from torch import Tensor
from transformers import AttentionInterface

from hipserve import ArgumentError, HiPCache, capture_decode


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of a cache is recorded."""
    monkeypatch.setattr("hipserve.integrations.transformers.capture.FIRST_STEPS", 1)


IDS = torch.randint(1, 96, (2, 90), generator=torch.Generator().manual_seed(5))


class Recorder:
    """Stands for a CUDA graph: repeats the call, of which the host's knowledge is hidden."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.cache: HiPCache | None = None

    def __call__(self, call: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1

        def replay() -> Any:
            self.replayed += 1
            with self.hidden():
                return call()

        return replay

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        assert self.cache is not None
        pages = [layer.pages for layer in self.cache.paged_layers]
        held = [(p.lengths, p._tables, p._block_table) for p in pages]
        for p in pages:
            p.lengths = p._tables = p._block_table = None  # type: ignore[assignment]
        try:
            yield
        finally:
            for p, (lengths, tables, table) in zip(pages, held, strict=True):
                p.lengths, p._tables, p._block_table = lengths, tables, table


def pair(hip: dict[str, Any] | None = None, family: str = "llama") -> tuple[Any, Any, Recorder]:
    """Two equal models, the second one captured."""
    recorder = Recorder()
    plain, model = (build(family, {**PRUNED, **(hip or {})}) for _ in range(2))
    return plain, capture_decode(model, recorder), recorder


def generate(model: Any, recorder: Recorder | None = None, **options: Any) -> tuple[Any, HiPCache]:
    cache = HiPCache(model.config, page_size=16)
    if recorder is not None:
        recorder.cache = cache
    ids = options.pop("input_ids", IDS)
    made = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=60,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
        **options,
    )
    return made, cache


@pytest.mark.parametrize(
    "hip", [{}, {"refresh_interval": 4}, {"dense_layers": [0]}, {"budget": 512}]
)
def test_captured_steps_equal_those_of_the_host(hip: dict[str, Any]) -> None:
    plain, model, recorder = pair(hip)
    (expected, held), (got, cache) = generate(plain), generate(model, recorder)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert recorder.replayed >= 57
    assert recorder.recorded <= 2
    assert cache.get_seq_length() == held.get_seq_length() == IDS.shape[1] + 59
    assert cache.count_keys() == pytest.approx(held.count_keys())


def test_a_padded_batch_is_captured_too() -> None:
    plain, model, recorder = pair()
    mask = torch.ones_like(IDS)
    mask[1, :37] = 0
    options = {"attention_mask": mask}
    (expected, _), (got, _) = generate(plain, **options), generate(model, recorder, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert recorder.replayed >= 57


@pytest.mark.parametrize("interval", [1, 3])
def test_beams_change_places_between_captured_steps(interval: int) -> None:
    """Whoever changes places selects again, so that a longer interval changes nothing."""
    plain, _, _ = pair()
    _, model, recorder = pair({"refresh_interval": interval})
    options = {"num_beams": 3, "input_ids": IDS[:1]}
    (expected, _), (got, _) = generate(plain, **options), generate(model, recorder, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert recorder.replayed >= 55


@torch.no_grad()
def steps(model: Any, cache: HiPCache, tokens: Tensor) -> Tensor:
    """`[tokens, vocab]`: logits of tokens `[n]` that follow one by one."""
    return torch.cat([model(t.view(1, 1), past_key_values=cache).logits[0] for t in tokens])


@torch.no_grad()
def test_prompts_between_captured_steps_and_crops() -> None:
    """Whatever changes the cache in between, the next step reads what is there."""
    plain, model, recorder = pair({"refresh_interval": 2})
    caches = HiPCache(plain.config, page_size=16), HiPCache(model.config, page_size=16)
    recorder.cache = caches[1]
    for prompt, count, crop in ((70, 5, 0), (1, 9, -4), (33, 20, -30), (2, 3, 0)):
        out: list[Tensor] = []
        for m, cache in zip((plain, model), caches, strict=True):
            m(IDS[:1, :prompt], past_key_values=cache)
            out.append(steps(m, cache, IDS[1, :count]))
            if crop:
                cache.crop(crop)
        torch.testing.assert_close(out[1], out[0], atol=1e-4, rtol=1e-4)
    assert recorder.replayed > 20


@torch.no_grad()
def test_captured_steps_join_long_runs() -> None:
    """From 32,768 keys on, as with fine runs of one key and pages of 16; steps cross two ends."""
    hip = {"key_block_size": 1, "bound_block_size": 1, "query_stride": 16}
    plain, model, recorder = pair(hip)
    prompt = torch.randint(1, 96, (1, 32_754), generator=torch.Generator().manual_seed(5))
    tokens, caches, out = prompt[0, :300], [], []
    for m in (plain, model):
        caches.append(HiPCache(m.config, page_size=16))
        recorder.cache = caches[-1]
        m(prompt, past_key_values=caches[-1], logits_to_keep=1)
        out.append(steps(m, caches[-1], tokens))
    torch.testing.assert_close(out[1], out[0], atol=1e-4, rtol=1e-4)
    assert recorder.replayed > 290
    for a, b in zip(*(cache.paged_layers for cache in caches), strict=True):
        long = a.pages.index.summaries[:, 18:]
        assert long.shape[1] == 1
        pages = torch.tensor(a.pages._tables[0])[15 : 129 * 16 : 16]
        assert torch.equal(b.pages.index.summaries[pages, 18:], long[pages])


def test_outputs_of_a_step_outlive_the_next() -> None:
    _, model, recorder = pair()
    recorder.cache = cache = HiPCache(model.config)
    with torch.no_grad():
        model(IDS[:1], past_key_values=cache)
        first, second = (
            model(IDS[1:, i : i + 1], past_key_values=cache, output_hidden_states=True)
            for i in range(2)
        )
    assert first.past_key_values is cache
    logits = first.logits.clone()
    with torch.no_grad():
        model(IDS[1:, 3:4], past_key_values=cache, output_hidden_states=True)
    assert torch.equal(first.logits, logits)
    assert not torch.equal(second.logits, logits)
    assert len(second.hidden_states) == 4


def test_a_cache_is_freed_with_its_last_use() -> None:
    """Its recorded step holds no reference to it, and nor does the model."""
    model = capture_decode(build("llama", PRUNED), lambda call: functools.partial(list, [call()]))
    cache = HiPCache(model.config)
    with torch.no_grad():
        model(IDS[:1], past_key_values=cache)
        out = model(IDS[1:, :1], past_key_values=cache)
    assert out.past_key_values is cache
    assert cache.recorded is not None
    alive = weakref.ref(cache), weakref.ref(cache.recorded)
    gc.disable()
    try:
        del cache, out
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


@torch.no_grad()
def test_a_recorded_step_keeps_no_memory_that_its_cache_gives_up() -> None:
    _, model, recorder = pair()
    recorder.cache = cache = HiPCache(model.config, page_size=16)
    model(IDS[:1, :16], past_key_values=cache)
    steps(model, cache, IDS[1, :2])
    before = [weakref.ref(layer.pages.pool.k_cache) for layer in cache.paged_layers]
    cache.reserve_step()
    for layer in cache.paged_layers:
        layer.pages.reserve([16 * layer.pages.pool.k_cache.shape[0]])
    assert [ref() for ref in before] == [None] * 3
    steps(model, cache, IDS[1, 2:4])
    assert recorder.recorded == 2


def test_what_cannot_be_captured_runs_as_before() -> None:
    """Layers with a window of their own, no cache of ours, gradients, and a model that waits."""
    plain, model, recorder = pair(family="gemma3")
    (expected, _), (got, _) = generate(plain), generate(model, recorder)
    assert torch.equal(got.sequences, expected.sequences)
    plain, model, recorder = pair()
    got = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(
        got, plain.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    )
    assert recorder.recorded == 0

    def refuse(_: object) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, model = build("llama", PRUNED), capture_decode(build("llama", PRUNED), refuse)
    (expected, _), (got, _) = generate(plain), generate(model)
    assert torch.equal(got.sequences, expected.sequences)


def test_short_answers_and_watched_calls_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hipserve.integrations.transformers.capture.FIRST_STEPS", 8)
    _, model, recorder = pair()
    recorder.cache = cache = HiPCache(model.config)
    with torch.no_grad():
        model(IDS[:1], past_key_values=cache)
        steps(model, cache, IDS[1, :7])
        assert recorder.recorded == 0
        steps(model, cache, IDS[1, 7:9])
    assert (recorder.recorded, recorder.replayed) == (1, 1)
    calls: list[int] = []
    usual = AttentionInterface()["hip"]

    def watched(module: Any, *args: Any, **options: Any) -> Any:
        calls.append(module.layer_idx)
        return usual(module, *args, **options)

    AttentionInterface.register("hip", watched)
    try:
        steps(model, cache, IDS[1, 9:11])
    finally:
        AttentionInterface.register("hip", usual)
    assert calls == [0, 1, 2, 0, 1, 2]
    del model.forward
    steps(model, cache, IDS[1, 11:13])
    assert (recorder.recorded, recorder.replayed) == (1, 1)


@torch.no_grad()
def test_a_mask_over_cached_keys_is_refused_as_before() -> None:
    _, model, recorder = pair()
    recorder.cache = cache = HiPCache(model.config)
    model(IDS[:1], past_key_values=cache)
    steps(model, cache, IDS[1, :3])
    mask = torch.ones(1, 94, dtype=torch.int64)
    mask[0, :20] = 0
    with pytest.raises(ArgumentError, match="a mask that hides of the 93 cached keys"):
        model(IDS[:1, :1], past_key_values=cache, attention_mask=mask)


@torch.no_grad()
def test_a_step_that_fails_has_not_happened() -> None:
    plain, model, recorder = pair()
    caches = HiPCache(plain.config), HiPCache(model.config)
    recorder.cache = caches[1]
    for m, cache in zip((plain, model), caches, strict=True):
        m(IDS[:1], past_key_values=cache)
    steps(model, caches[1], IDS[1, :2]), steps(plain, caches[0], IDS[1, :2])
    layer = model.model.layers[1]
    kept, layer.forward = layer.forward, None
    with pytest.raises(TypeError):
        steps(model, caches[1], IDS[1, 2:3])
    layer.forward = kept
    after = [steps(m, c, IDS[1, 2:6]) for m, c in zip((plain, model), caches, strict=True)]
    torch.testing.assert_close(after[1], after[0], atol=1e-4, rtol=1e-4)


def test_other_settings_are_another_step() -> None:
    plain, model, recorder = pair()
    caches = HiPCache(plain.config), HiPCache(model.config)
    recorder.cache = caches[1]
    with torch.no_grad():
        for m, cache in zip((plain, model), caches, strict=True):
            m(IDS[:1], past_key_values=cache)
    for budget in (32, 16):
        for m in (plain, model):
            m.config.hip = {**PRUNED, "budget": budget}
        out = [steps(m, c, IDS[1, :4]) for m, c in zip((plain, model), caches, strict=True)]
        torch.testing.assert_close(out[1], out[0], atol=1e-4, rtol=1e-4)
    assert recorder.recorded == 2


def test_a_model_without_a_gpu_is_refused() -> None:
    model, _ = twins("llama")
    with pytest.raises(ArgumentError, match="model: expected a model on one GPU, got one on cpu"):
        capture_decode(model)
