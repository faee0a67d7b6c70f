"""Quality is measured as described: tasks, scores, intervals, likelihoods."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from hipserve import ArgumentError, FitError, HiPConfig
from hipserve.attention import crossover
from hipserve.lab import (
    Document,
    evaluate_perplexity,
    evaluate_retrieval,
    make_sample,
    read_documents,
)
from hipserve.lab.intervals import mean, wilson
from hipserve.lab.quality import passes, perplexity, retrieval
from hipserve.lab.quality.passes import Answer, greedy_hits
from hipserve.lab.text import language_reference
from hipserve.models import LoadedModel, bundled_path, load
from long_texts import HAY, count, tasks

SMALL = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=64, dense_below=0)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (50, 50, (0.9287, 1.0))],
)
def test_wilson(successes: int, trials: int, expected: tuple[float, float]) -> None:
    """Values of Wilson's formula as published tables give them."""
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(successes, trials) == pytest.approx(expected, abs=1e-4)


class FakeModel:
    """Answers a question when `knows` does; `use` notes which attention is on."""

    name, max_context, tokenizer = "fake", 10_000, None

    def __init__(self) -> None:
        self.config: HiPConfig | None = None

    def use(self, config: HiPConfig | None) -> None:
        self.config = config

    def check_fit(self, tokens: int, new: int) -> None:
        assert tokens + new <= self.max_context


def test_retrieval_scores_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense knows all, HiP misses every fourth token of every second answer."""
    model: Any = FakeModel()
    asked: list[tuple[str, bool]] = []

    def hits(loaded: FakeModel, prompts: list[str], answers: list[str]) -> list[Answer]:
        assert len(prompts) == len(answers) == 1
        asked.append((prompts[0], loaded.config is None))
        weak = loaded.config is not None and len(asked) % 4 == 0
        return [Answer([not weak or i % 4 > 0 for i in range(8)], -3.0 if weak else -1.0)]

    monkeypatch.setattr(retrieval, "read_answers", hits)
    monkeypatch.setattr(retrieval, "_answer_ids", lambda loaded, asked: asked.answer.split())
    monkeypatch.setattr(FakeModel, "encode", lambda self, turns: turns[0]["content"], raising=False)
    monkeypatch.setattr(retrieval, "_count", lambda loaded, form, sample: count(sample))
    progress: list[Any] = []
    report = evaluate_retrieval(
        model,
        {"dense": None, "hip": SMALL},
        ["passkey", "variables"],
        HAY,
        length=1000,
        samples=6,
        form="chat",
        progress=lambda *step: progress.append(step),
    )
    exact, partial = report.results
    assert exact.scores["dense"].mean == partial.scores["dense"].mean == 1.0
    assert exact.scores["hip"].mean == 0.5
    assert partial.scores["hip"].mean == pytest.approx(0.875)
    assert exact.scores["hip"].interval == wilson(3, 6)
    assert exact.difference["hip"].mean == -0.5
    assert partial.difference["hip"].interval[0] < partial.difference["hip"].mean < 0
    assert "dense" not in exact.difference
    flips = exact.flips["hip"], partial.flips["hip"]
    assert [(row.lost, row.gained, row.nats) for row in flips] == [(3, 0, -1.0)] * 2
    assert flips[0].nats_interval[0] < -1 < flips[0].nats_interval[1]
    assert flips[0].verdict.margin == report.margin == 0.02
    pairs = list(zip(asked[::2], asked[1::2], strict=True))
    assert all(a[0] == b[0] and a[1] and not b[1] for a, b in pairs), "the same samples, in turn"
    assert len({a[0] for a, _ in pairs}) == 12
    assert progress[-1] == ("variables", "hip", 6)
    assert json.loads(json.dumps(report.to_dict()))["configs"]["hip"]["budget"] == 64


def test_greedy_hits_are_those_of_generate(loaded: LoadedModel) -> None:
    loaded.use(HiPConfig())
    fact = "Read the text.\n\nThe pass key is 83724. Remember it. 83724 is the pass key."
    question = "What is the pass key?"
    prompt = loaded.encode([{"role": "user", "content": text} for text in (fact, question)])
    made = loaded.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
    )[0, prompt.shape[1] :]
    assert all(greedy_hits(loaded, [prompt], [made])[0])
    wrong = made.clone()
    wrong[5] = (wrong[5] + 1) % 8192
    (hits,) = greedy_hits(loaded, [prompt], [wrong])
    assert hits[:5] == [True] * 5
    assert not hits[5]


@pytest.mark.parametrize("config", [None, HiPConfig()], ids=["dense", "roomy"])
def test_questions_after_one_reading_get_the_answers_of_a_reading_each(
    loaded: LoadedModel, config: HiPConfig | None
) -> None:
    loaded.use(config)
    sample = make_sample("niah", language_reference(), 1000, count, 0, questions=3)
    prompts = [retrieval.encode(loaded, sample.document, asked) for asked in sample.questions]
    answers = [retrieval._answer_ids(loaded, asked) for asked in sample.questions]
    answers[1] = answers[1].flip(0)
    apart = [
        greedy_hits(loaded, [prompt], [answer])[0]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert greedy_hits(loaded, prompts, answers) == apart
    assert [all(hits) for hits in apart][1:] != [True, True]


@pytest.mark.parametrize("config", [None, SMALL, HiPConfig()], ids=["dense", "pruned", "roomy"])
def test_nll_is_that_of_one_forward_pass(
    loaded: LoadedModel, config: HiPConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks over a cache, against `log_softmax` of all logits at once."""
    loaded.use(config)
    ids = loaded.tokenizer(language_reference()[:6000], return_tensors="pt")["input_ids"][:, :1200]
    monkeypatch.setattr(passes, "LOGITS_BYTES", 256 * 4 * 8192)
    nll = perplexity.token_nll(loaded, ids)
    with torch.no_grad():
        logits = loaded.model(ids, use_cache=False).logits[0, :-1].double()
    direct = -logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(nll.double(), direct, atol=2e-3, rtol=1e-3)


def test_logits_are_made_where_they_count_and_keep_to_their_bound(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so many rows at once, and none before the first position that counts."""
    loaded.use(SMALL)
    ids = torch.randint(3, 8192, (1, 1500))
    whole = perplexity.token_nll(loaded, ids)
    monkeypatch.setattr(passes, "LOGITS_BYTES", 300 * 4 * 8192)
    monkeypatch.setattr("hipserve.models.passes.CHUNK", 512)
    rows: list[int] = []
    hook = loaded.model.lm_head.register_forward_hook(lambda *io: rows.append(io[2].shape[1]))
    late = perplexity.token_nll(loaded, ids, first=1000)
    hook.remove()
    torch.testing.assert_close(late, whole[999:], atol=1e-4, rtol=1e-4)
    assert sum(rows) == 501 + 2, "two chunks of 512 before them, the last row of each"
    assert max(rows) <= 256


def test_perplexity_report(loaded: LoadedModel) -> None:
    text = language_reference()
    documents = [
        Document("one", "docs", text[:9000]),
        Document("two", "docs", text[50_000:59_000]),
        Document("three", "other", text[90_000:99_000]),
        Document("four", "other", text[130_000:139_000]),
        Document("short", "other", "not enough"),
    ]
    configs = {"dense": None, "hip": SMALL, "again": None}
    report = evaluate_perplexity(loaded, configs, documents, length=1100, first=76)
    assert report.documents == ["one", "two", "three", "four"]
    assert report.too_short == ["short"]
    dense, hip = report.results["dense"], report.results["hip"]
    assert dense.change == 0
    assert report.results["again"] == dense
    assert dense.mean == pytest.approx(mean(list(dense.by_domain.values())))
    assert hip.change == pytest.approx(hip.mean / dense.mean - 1)
    assert hip.interval is not None
    assert hip.interval[0] <= hip.change <= hip.interval[1]
    assert hip.pieces == 4
    assert 0 < abs(hip.change) < 0.2
    assert hip.perplexity == pytest.approx(math.exp(hip.mean))
    loaded.use(None)
    nlls = []
    for document in documents[2:4]:
        ids = loaded.tokenizer(document.text, return_tensors="pt")["input_ids"][:, :1100]
        nlls.append(perplexity.token_nll(loaded, ids)[75:].mean().item())
    assert dense.by_domain["other"] == pytest.approx(mean(nlls), rel=1e-5)


def test_one_piece_makes_no_interval(loaded: LoadedModel) -> None:
    """A single value says nothing about others."""
    documents = [Document("one", "docs", language_reference()[:4000])]
    report = evaluate_perplexity(loaded, {"dense": None, "hip": SMALL}, documents, length=500)
    assert report.results["hip"].change != 0
    assert (report.results["hip"].interval, report.results["hip"].pieces) == (None, 1)


@tasks
def test_a_continuation_completes_what_the_document_says(task: str) -> None:
    sample = make_sample(task, HAY, 2000, count, 5, questions=3)
    for asked in sample.questions:
        if task == "variables":
            assert asked.cue + asked.completion == (
                asked.cue + " " + " ".join(re.findall(r"VAR (\w+) =", sample.document))
            )
        else:
            assert asked.cue + asked.completion in sample.document
        assert asked.completion.strip().strip('"') in asked.answer


def test_running_text_is_cut_between_tokens(loaded: LoadedModel) -> None:
    sample = make_sample("kv", language_reference(), 900, count, 0)
    asked = sample.questions[0]
    prompt, answer = retrieval._encode(loaded, sample.document, asked, "continuation")
    text = f"{sample.document}\n\n{asked.cue}{asked.completion}"
    assert torch.equal(
        torch.cat([prompt[0], answer]), torch.tensor(loaded.tokenizer(text).input_ids)
    )
    assert loaded.tokenizer.decode(answer).strip().strip('"') in asked.completion
    assert len(answer) > 1


def test_the_form_follows_the_chat_template(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base model is given a text to complete: nobody asks it anything."""
    seen: list[str] = []

    def hits(_: Any, prompts: list[torch.Tensor], answers: list[torch.Tensor]) -> list[Answer]:
        seen.append(loaded.tokenizer.decode(prompts[0][0], skip_special_tokens=True))
        return [Answer([True], -0.1) for _ in prompts]

    monkeypatch.setattr(retrieval, "read_answers", hits)
    run = functools.partial(
        evaluate_retrieval, loaded, {"hip": SMALL}, ["passkey"], HAY, length=600, samples=1
    )
    assert run().form == "chat"
    assert run(form="continuation").form == "continuation"
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    assert run().form == "continuation"
    assert ["What is the pass key?" in text for text in seen] == [True, False, False]
    assert all(text.endswith("The pass key is") for text in seen[1:])


def test_a_model_with_windows_reads_a_document_once_for_all_questions(tmp_path: Path) -> None:
    """Its windowed layers cannot be cropped, so every question but the last reads in a copy."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8192}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**sizes, **heads, sliding_window=16, layer_types=kinds)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    gemma = LoadedModel(model, tokenizer, "tiny", 4096)
    for attention in (HiPConfig(), None):
        gemma.use(attention)
        head = torch.randint(3, 8192, (1, 300))
        prompts = [torch.cat([head, torch.randint(3, 8192, (1, 20))], 1) for _ in range(3)]
        answers = [torch.randint(3, 8192, (4,)) for _ in range(3)]
        likely = [model(prompt).logits[0, -1].argmax() for prompt in prompts]
        for answer, token in zip(answers[:2], likely[:2], strict=True):
            answer[0] = token
        apart = [
            greedy_hits(gemma, [prompt], [answer])[0]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        read: list[int] = []
        hook = model.model.embed_tokens.register_forward_hook(
            lambda *io, read=read: read.append(io[1][0].shape[1])
        )
        assert greedy_hits(gemma, prompts, answers) == apart
        hook.remove()
        assert sum(read) == 300 + 3 * (20 + 4)
        assert any(any(hits) for hits in apart)


def test_where_anything_is_pruned(loaded: LoadedModel) -> None:
    config = HiPConfig(budget=256, sliding_window=256)
    assert not passes.may_prune(loaded, None, 100_000)
    assert not passes.may_prune(loaded, config, 1500), "below dense_below"
    assert passes.may_prune(loaded, config.replace(dense_below=0), 1500)
    assert passes.may_prune(loaded, config, 100_000)
    everywhere = config.replace(dense_layers=loaded.model.config.num_hidden_layers)
    assert not passes.may_prune(loaded, everywhere, 100_000)


def test_perplexity_of_nothing(loaded: LoadedModel) -> None:
    short = [Document("a", "b", "too short")]
    with pytest.raises(FitError, match="nothing to measure"):
        evaluate_perplexity(loaded, {"dense": None}, short, length=2000)
    for first in (0, 10):
        with pytest.raises(ArgumentError, match="first: expected a position from 1 to 9, got"):
            evaluate_perplexity(loaded, {"dense": None}, short, length=10, first=first)
    with pytest.raises(FitError, match="context is 131,072"):
        evaluate_perplexity(loaded, {"dense": None}, [], length=2**20)


def test_documents(tmp_path: Path) -> None:
    assert read_documents()[0].text == language_reference()
    assert len(language_reference()) > 300_000
    plain, lines = tmp_path / "a.md", tmp_path / "b.jsonl"
    plain.write_text("\ufeffprose", encoding="utf-8")
    rows = [{"text": "x", "title": "T", "domain": "D"}, {"text": "y", "id": 7}, {"text": "z"}]
    lines.write_text("\n\n".join(map(json.dumps, rows)))
    assert read_documents([plain, str(lines)]) == [
        Document("a.md", "md", "prose"),
        Document("T", "D", "x"),
        Document("7", "b", "y"),
        Document("b.jsonl:5", "b", "z"),
    ]
    for content in ('{"text": 3}', "[]", "{"):
        lines.write_text(content)
        with pytest.raises(ArgumentError, match="line 1"):
            read_documents([lines])


def test_the_cache_fits_the_attention(loaded: LoadedModel) -> None:
    from hipserve.models.passes import make_cache

    names = []
    for config in (None, SMALL):
        loaded.use(config)
        names.append(type(make_cache(loaded)).__name__)
    assert names == ["DynamicCache", "HiPCache"]
    assert loaded.model.config.hip["budget"] == 64


def test_a_measured_crossover_decides_where_anything_is_pruned(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passes.may_prune(loaded, HiPConfig(), 3000)
    monkeypatch.setattr(crossover, "_may_measure", lambda kind: True)
    monkeypatch.setattr(crossover, "measured", lambda name, measure, check: 4096)
    crossover.rule_for.cache_clear()
    try:
        assert not passes.may_prune(loaded, HiPConfig(), 3000)
        assert passes.may_prune(loaded, HiPConfig(), 5000)
    finally:
        crossover.rule_for.cache_clear()
