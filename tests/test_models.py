"""Models by name, and conversations that read only what is new."""

from __future__ import annotations

import copy
import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
)

from hipserve import ArgumentError, FitError, HiPCache, HiPConfig
from hipserve.lab.quality.tasks import PASS_KEY_QUESTION, pass_key
from hipserve.lab.text import language_reference
from hipserve.models import Conversation, LoadedModel, load, passes
from hipserve.models.loading import bundled_path
from hipserve.platform import cpu_multiplies
from tiny_models import build, prompts, twins

FACT, QUESTION = pass_key("83724"), PASS_KEY_QUESTION
PRUNED = HiPConfig(
    budget=128, num_sink_tokens=16, sliding_window=64, dense_below=0, refresh_interval=1
)
LINE = "The heron waits by the river until the salmon come.\n"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load(device="cpu", dtype=torch.float32)


@pytest.fixture
def loaded(model: LoadedModel) -> LoadedModel:
    model.use(HiPConfig())
    return model


def test_dense_attention_is_what_the_model_defines() -> None:
    """SDPA leaves out the cap of Gemma 2's scores, and GPT-OSS has none."""
    kinds = {"gemma2": "eager", "llama": "sdpa", "qwen3": "sdpa", "gemma3": "sdpa"}
    for family, expected in kinds.items():
        model = build(family)
        loaded = LoadedModel(model, AutoTokenizer.from_pretrained(bundled_path()), family, 512)
        loaded.use(None)
        assert model.config._attn_implementation == expected
        assert ("SDPA" in loaded.backend) == (expected == "sdpa")
    _, eager = twins("gemma2")
    loaded = LoadedModel(build("gemma2"), loaded.tokenizer, "gemma2", 512)
    loaded.use(None)
    ids = prompts(length=60)
    with torch.no_grad():
        expected = eager(ids).logits
        torch.testing.assert_close(loaded.model(ids).logits, expected)
        loaded.model.set_attn_implementation("sdpa")
        assert not torch.allclose(loaded.model(ids).logits, expected, atol=1e-3)
    assert transformers.GptOssPreTrainedModel._supports_sdpa is False


def about(loaded: LoadedModel, characters: int = 600) -> Conversation:
    """A conversation about a stretch of real text with the fact at its middle."""
    text, half = language_reference(), characters // 2
    talk = Conversation(loaded)
    talk.say(f"Read the text.\n\n{text[:half]}\n{FACT}\n{text[half:characters]}")
    return talk


def test_the_bundled_model_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = load()
    assert loaded.name == "acorn"
    assert loaded.max_context == 131_072
    own = torch.bfloat16
    assert loaded.model.dtype == (own if cpu_multiplies(own) else torch.float32)
    assert loaded.model.config._attn_implementation == "hip"
    assert (bundled_path() / "MODEL_CARD.md").exists()
    assert about(loaded).ask(QUESTION) == "The pass key is 83724."


@pytest.mark.parametrize("config", [HiPConfig(), PRUNED, None], ids=["hip", "pruned", "dense"])
def test_answers_are_right(loaded: LoadedModel, config: HiPConfig | None) -> None:
    loaded.use(config)
    talk = about(loaded, 7000)
    assert talk.ask(QUESTION) == "The pass key is 83724."
    assert talk.statistics is not None
    assert talk.statistics.prompt_tokens > 1500
    pruned = config == PRUNED
    assert (talk.statistics.prefill_share < 0.6) == pruned
    assert (talk.statistics.decode_share < 0.25) == pruned
    cache = DynamicCache if config is None else HiPCache
    assert isinstance(talk._cache, cache)
    assert talk.statistics.cache_bytes >= 1500 * 12 * 2 * 2 * 64 * 4


def test_with_room_for_everything_hip_says_what_dense_says(loaded: LoadedModel) -> None:
    """Greedy tokens in float32, whatever is asked."""
    answers = {}
    for name, config in (("hip", HiPConfig(budget=4096, dense_below=0)), ("dense", None)):
        loaded.use(config)
        talk = about(loaded, 3000)
        questions = (QUESTION, "Continue the passage: The assert statement", "Why?")
        answers[name] = [talk.ask(question, max_new_tokens=24) for question in questions]
    assert answers["hip"] == answers["dense"]


def test_a_follow_up_reads_only_new_tokens(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = about(loaded)
    talk.ask(QUESTION)
    first = talk.statistics
    assert first is not None
    read: list[int] = []
    forward = loaded.model.forward

    def counted(input_ids: torch.Tensor, **options: Any) -> Any:
        read.append(input_ids.shape[1])
        return forward(input_ids, **options)

    monkeypatch.setattr(loaded.model, "forward", counted)
    assert talk.ask(QUESTION) == "The pass key is 83724."
    second = talk.statistics
    assert second is not None
    assert second.cached_tokens >= first.prompt_tokens
    assert sum(read) == second.prompt_tokens - second.cached_tokens + second.new_tokens - 1
    roles = [turn["role"] for turn in talk.turns]
    assert roles == ["user", "user", "assistant", "user", "assistant"]


def test_a_follow_up_answers_as_if_all_was_read_at_once(loaded: LoadedModel) -> None:
    loaded.use(HiPConfig(budget=4096, dense_below=0))
    talk = about(loaded)
    for _ in range(2):
        talk.ask(QUESTION)
    again = Conversation(loaded)
    again.turns = talk.turns[:-2]
    assert again.ask(QUESTION) == talk.turns[-1]["content"]
    assert again.statistics is not None
    assert again.statistics.cached_tokens == 0


def test_what_does_not_fit_leaves_the_conversation_as_it_was(loaded: LoadedModel) -> None:
    talk = about(loaded)
    talk.ask(QUESTION)
    before = (list(talk.turns), talk.statistics, talk._ids.clone(), talk._cache.get_seq_length())
    with pytest.raises(FitError, match=r"200,\d\d\d tokens \+ 64 for the answer = .* shorten"):
        talk.ask(" ".join(["key"] * 200_000))
    with pytest.raises(FitError, match="its context is 131,072") as error:
        talk.ask(QUESTION, max_new_tokens=131_072)
    assert error.value.message.startswith("the answer does not fit")
    assert "shorten" not in str(error.value)
    assert "set max_new_tokens to 13" in error.value.hint
    assert before[:2] == (talk.turns, talk.statistics)
    assert torch.equal(before[2], talk._ids)
    assert before[3] == talk._cache.get_seq_length()
    assert talk.ask(QUESTION) == "The pass key is 83724."


def test_half_a_surrogate_pair_is_refused(loaded: LoadedModel) -> None:
    talk = about(loaded)
    with pytest.raises(ArgumentError, match=r"content: expected text .* got '.ud800' at char"):
        talk.ask("What is \ud800?")
    assert talk.ask(QUESTION) == "The pass key is 83724."


def test_an_interrupted_question_can_be_asked_again(loaded: LoadedModel) -> None:
    loaded.use(HiPConfig(refresh_interval=1))
    talk = about(loaded, 7000)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    for broken in ({"on_prefill": interrupt}, {"on_text": stop}):
        with pytest.raises(KeyboardInterrupt):
            talk.ask(QUESTION, **broken)
    assert len(talk.turns) == 1
    assert talk.ask(QUESTION) == "The pass key is 83724."
    inside = loaded.model.model.layers[2].register_forward_hook(lambda *_: interrupt(0, 0))
    with pytest.raises(KeyboardInterrupt):
        talk.ask("What is it?")  # the first layers hold keys now that the others do not
    inside.remove()
    assert talk.ask(QUESTION) == "The pass key is 83724."
    assert len({layer.get_seq_length() for layer in talk._cache.layers}) == 1


def test_answers_stream_and_prefill_is_reported(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "CHUNK", 64)
    pieces: list[str] = []
    steps: list[tuple[int, int]] = []
    talk = about(loaded)
    answer = talk.ask(QUESTION, on_text=pieces.append, on_prefill=lambda *step: steps.append(step))
    assert "".join(pieces) == answer
    assert len(pieces) > 3
    assert talk.statistics is not None
    total = talk.statistics.prompt_tokens - 1
    assert [done for done, _ in steps] == [*range(64, total, 64), total]
    assert {left for _, left in steps} == {total}
    assert talk.statistics.first_token_seconds > 0
    assert talk.statistics.decode_tokens_per_second > 0


def test_chunks_of_a_follow_up_end_where_those_of_one_pass_would(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "CHUNK", 64)
    talk = about(loaded)
    talk.ask(QUESTION)
    read: list[int] = []
    talk.ask(LINE * 20, on_prefill=lambda done, _: read.append(done))
    assert talk.statistics is not None
    ends = [talk.statistics.cached_tokens + done for done in read]
    assert len(ends) > 3
    assert all(end % 64 == 0 for end in ends[:-1])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./missing", "no such directory"),
        ("/missing/acorn", "no such directory"),
        ("acron", '"acron"'),
        ("a b c", '"a b c"'),
        ("", "no name"),
    ],
)
def test_unknown_models(name: str, reason: str) -> None:
    with pytest.raises(ArgumentError, match="model: expected") as error:
        load(name)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gguf_file_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"no gguf and no accelerate; .*hipserve\[gguf\]"):
        load(str(path))


def test_unknown_devices() -> None:
    for device in ("tpu", "cuda:99", "cpu:x"):
        with pytest.raises(ArgumentError, match=r"device: expected .*cpu"):
            load(device=device)


def tiny(tmp_path: Path, config: Any) -> str:
    """A checkpoint of random weights with the bundled tokenizer, on disk."""
    from transformers import AutoTokenizer

    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bundled_path()).save_pretrained(tmp_path)
    return str(tmp_path)


SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def test_a_checkpoint_in_a_directory_brings_its_own_settings(tmp_path: Path) -> None:
    loaded = load(tiny(tmp_path, LlamaConfig(**SIZES, hip={"budget": 256})), device="cpu")
    assert loaded.model.config.hip["budget"] == 256
    assert loaded.max_context == 2048
    talk = Conversation(loaded)
    talk.say("one")
    assert isinstance(talk.ask("two", max_new_tokens=4), str)
    assert talk.loaded.encode(talk.turns[:2])[0, 0] == 0
    with pytest.raises(FitError, match="context is 2,048"):
        talk.ask("x", max_new_tokens=4096)


def test_a_model_without_a_chat_template_reads_plain_text(tmp_path: Path) -> None:
    loaded = load(tiny(tmp_path, LlamaConfig(**SIZES)), device="cpu")
    loaded.tokenizer.chat_template = None
    ids = loaded.encode([{"role": "user", "content": "one"}, {"role": "user", "content": "two"}])
    assert loaded.tokenizer.decode(ids[0], skip_special_tokens=True) == "one\n\ntwo\n\n"


def test_windowed_layers_that_cannot_be_cropped_are_read_again(tmp_path: Path) -> None:
    """Gemma's windowed layers keep only their window: nothing before it can be taken back."""
    config = Gemma3TextConfig(**SIZES, sliding_window=16)
    loaded = load(tiny(tmp_path, config), device="cpu", dtype=torch.float32)
    talk = Conversation(loaded)
    talk.say(LINE * 20)
    talk.ask("one", max_new_tokens=8)
    talk.turns[-2]["content"] = "another one"
    expected = Conversation(loaded)
    expected.turns = list(talk.turns)
    assert talk.ask("two", max_new_tokens=8) == expected.ask("two", max_new_tokens=8)
    assert talk.statistics is not None
    assert talk.statistics.cached_tokens == 0


def test_sdpa_reads_windowed_layers_in_small_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes all of a chunk and the window before it; the answer is the same."""
    path = tiny(tmp_path, Gemma3TextConfig(**SIZES, sliding_window=16))
    model = load(path, device="cpu", dtype=torch.float32)
    monkeypatch.setattr(passes, "WINDOWED_CHUNK", 64)
    ids = torch.arange(150)[None] % 100
    steps: dict[str, list[Any]] = {}
    for name, config in (("sdpa", None), ("hip", PRUNED)):
        model.use(config)
        steps[name] = list(passes.read(model, ids, passes.make_cache(model)))
    assert [step.stop for step in steps["sdpa"]] == [64, 128, 150]
    assert [step.stop for step in steps["hip"]] == [150]
    model.use(None)
    (whole,) = passes.read(model, ids, passes.make_cache(model), rows=4096)
    torch.testing.assert_close(steps["sdpa"][-1].logits, whole.logits)


def test_switching_attention_is_complete(loaded: LoadedModel) -> None:
    loaded.use(None)
    assert loaded.backend == "torch SDPA"
    loaded.use(PRUNED)
    assert loaded.backend.startswith(("cpu (", "reference"))
    assert HiPConfig.from_dict(loaded.model.config.hip) == PRUNED


def test_control_tokens_of_a_text_are_text(loaded: LoadedModel) -> None:
    """They end no turn, whatever the template; those who want them may have them."""
    end = loaded.tokenizer.eos_token
    wild = [{"role": "user", "content": f"a{end}b \ue0f07\ue0f1 {end}"}]
    tame = [{"role": "user", "content": "a"}]
    ids = loaded.encode(wild)[0]
    stop = loaded.tokenizer.eos_token_id
    assert int((ids == stop).sum()) == int((loaded.encode(tame) == stop).sum())
    assert wild[0]["content"] in loaded.tokenizer.decode(ids)
    wanted = dataclasses.replace(loaded, control_tokens=True).encode(wild)[0]
    assert int((wanted == stop).sum()) == int((ids == stop).sum()) + 2


def test_turns_in_a_row_are_rendered_as_a_server_does(loaded: LoadedModel) -> None:
    """Only a template that refuses them gets them joined."""
    turns = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    tokenizer = copy.deepcopy(loaded.tokenizer)
    theirs = dataclasses.replace(loaded, tokenizer=tokenizer, name="theirs")
    options = {"add_generation_prompt": True, "return_dict": False}
    assert theirs.encode(turns)[0].tolist() == tokenizer.apply_chat_template(turns, **options)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 % 2 %}{{ raise_exception('alternate') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    assert tokenizer.decode(theirs.encode(turns)[0]) == "one\n\ntwo"
