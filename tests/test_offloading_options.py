"""`hipserve run` and `chat` with keys and values in host memory or in a file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hipserve import ArgumentError, HiPConfig
from hipserve.cli import offloading, options
from hipserve.cli.main import app
from hipserve.host import HostMemory

FACT = "The pass key is 83724. Remember it. 83724 is the pass key."


def test_run_answers_from_a_file_what_it_answers_from_memory(tmp_path: Path) -> None:
    doc = tmp_path / "doc.txt"
    doc.write_text("The grass is green. The sky is blue. " * 150 + FACT + " The sun is hot." * 200)
    codes = tmp_path / "codes.toml"
    codes.write_text("code_bits = 4\nrerank = 8\n")
    kv = tmp_path / "kv"
    kv.mkdir()

    def run(*options: str) -> dict[str, Any]:
        words = ["run", "What is the pass key?", "--doc", str(doc), "--device", "cpu", "--json"]
        result = CliRunner().invoke(app, [*words, *options])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    resident, offloaded = run("--config", str(codes)), run("--kv-file", str(kv))
    assert resident["answer"] == offloaded["answer"]
    assert resident["decode_share"] == offloaded["decode_share"]
    assert resident["offloaded_bytes"] == 0 < offloaded["offloaded_bytes"]
    assert offloaded["offloaded_bytes"] < offloaded["cache_bytes"]
    assert not list(kv.iterdir())


@pytest.mark.parametrize(
    ("given", "device", "said"),
    [
        ((False, None, 2**30, None), "cpu", "host_kv_memory: expected --kv-offload or --kv-file"),
        (
            (False, None, None, 2**30),
            "cuda",
            "kv_device_memory: expected --kv-offload or --kv-file",
        ),
        ((True, None, None, None), "cpu", "kv_offload: expected a model on a GPU"),
        ((False, Path("kv"), None, None), "cuda:0", "kv_file: expected a model on a CPU"),
        ((True, Path("kv"), None, None), "cuda", "kv_file: expected a model on a CPU"),
        ((False, Path("kv"), None, 2**30), "cpu", "kv_device_memory: expected a model on a GPU"),
    ],
)
def test_options_that_do_not_go_together_are_named(given: Any, device: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        offloading.is_asked_for(*given, device=device)


def test_dense_attention_reads_everything() -> None:
    with pytest.raises(ArgumentError, match="--dense: expected no offloading with it"):
        offloading.is_asked_for(True, None, None, None, device="cuda", dense=True)
    assert not offloading.is_asked_for(False, None, None, None, device="cuda", dense=True)


def test_a_whole_context_has_room_unless_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: Any = SimpleNamespace(kv_token_bytes=2**17, max_context=131072)
    memory = HostMemory(total=2**37, available=2**36)
    monkeypatch.setattr(HostMemory, "read", lambda: memory)
    made = offloading.make_offload(loaded, None, None, None)
    assert made.host_bytes == 2**17 * (131072 + 4096)
    assert made.device_bytes == made.host_bytes // 8
    monkeypatch.setattr(HostMemory, "read", lambda: HostMemory(2**34, 2**33))
    made = offloading.make_offload(loaded, None, None, None)
    assert (made.host_bytes, made.device_bytes) == (2**32, 2**17 * 4096)
    assert offloading.make_offload(loaded, None, 7 * 2**30, 2**30).device_bytes == 2**30
    made = offloading.make_offload(loaded, Path("kv"), None, None)
    assert (made.device_memory, made.host_bytes) == (None, 2**17 * (131072 + 4096))


def test_codes_are_searched_unless_a_file_says_what_is() -> None:
    made = offloading.searching_codes(HiPConfig(budget=512), None, "default")
    assert made == HiPConfig(budget=512, code_bits=4, rerank=8)
    assert offloading.searching_codes(HiPConfig.preset("fast"), None, "fast").rerank == 2
    assert offloading.searching_codes(HiPConfig(), Path("hip.toml"), "default") == HiPConfig()


def test_commands_that_choose_a_search_choose_its_codes() -> None:
    group: Any = typer.main.get_command(app)
    commands = {**group.commands, **group.commands["eval"].commands}
    names = {"run", "chat", "serve", "plan", "perplexity", "retrieval"}
    for name in names:
        options = {word for option in commands[name].params for word in option.opts}
        assert {"--budget", "--selector", "--preset", "--config", "--code-bits"} <= options, name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--code-bits 16 --kv-file kv", "expected 4 or 8 where keys are offloaded"),
        ("--code-bits 4 --dense", "dense: expected no pruning options with it, got --code-bits"),
        ("--code-bits 5", "--code-bits: expected 4, 8 or 16"),
    ],
)
def test_codes_are_refused_before_a_model_is_loaded(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "load_model", lambda *_: pytest.fail("loaded"))
    (tmp_path / "doc.txt").write_text(FACT)
    monkeypatch.chdir(tmp_path)
    given = ["run", "What?", "--doc", "doc.txt", "--device", "cpu", *words.split()]
    result = CliRunner().invoke(app, given)
    assert said in str(result.exception)
