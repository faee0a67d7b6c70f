"""`eval`, `demo`, `doctor` and what all commands share: exit codes, streams, tables."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from hipserve.cli import main as command
from hipserve.cli import output
from hipserve.cli.demo import FACTS
from hipserve.errors import ArgumentError, BackendError, FitError, HipserveError
from hipserve.lab.quality.tasks import PASS_KEY_QUESTION, pass_key
from shell import HIPSERVE, invoke, refused

FACT, QUESTION = pass_key("83724"), PASS_KEY_QUESTION


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever happens inside, it leaves as a sentence; markup in it is printed, not obeyed."""
    for error, code, line in (
        (FitError("too [red]long[/red]"), 3, "error: too [red]long[/red]"),
        (BackendError("no backend"), 4, "error: no backend"),
        (ArgumentError("budget", "more", "0"), 2, "error: budget: expected more, got 0"),
        (HipserveError("the server did not start"), 1, "error: the server did not start"),
        (MemoryError(), 1, "error: MemoryError: no reason given; HIPSERVE_DEBUG=1 shows where"),
        (RuntimeError("a\nb"), 1, "error: RuntimeError: a b; HIPSERVE_DEBUG=1 shows where"),
    ):

        def fail(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(command, "app", fail)
        assert refused(monkeypatch, capsys) == (code, line, "")
        monkeypatch.setenv("HIPSERVE_DEBUG", "1")
        with pytest.raises(type(error)):
            command.main()
        monkeypatch.delenv("HIPSERVE_DEBUG")


def test_eval_tables_and_json(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The heron waits by the river until the salmon come. " * 300)
    small = ("--text", str(path), "--length", "1k", "--budget", "128")
    options = (*small, "--vary", "num_sink_tokens=16,64")
    result = invoke("eval", "perplexity", *options, "--json")
    report = json.loads(result.stdout)
    assert list(report["results"]) == ["dense", "hip", "num_sink_tokens=16", "num_sink_tokens=64"]
    assert report["results"]["dense"]["change"] == 0
    assert report["configs"]["hip"]["budget"] == 128
    assert report["first"] == 256
    options = (
        *small,
        "--samples",
        "2",
        "--tasks",
        "passkey,quote,niah",
        "--questions",
        "3",
        "--also",
        "paper",
        "--no-dense",
    )
    result = invoke("eval", "retrieval", *options)
    assert result.exit_code == 0
    for word in ("passkey", "quote", "hip", "paper", "acorn, 1k tokens"):
        assert word in result.stdout
    assert re.search(r"niah\s+│ 6 ", result.stdout), "three questions about two documents"
    assert "dense" not in result.stdout
    assert "\n0:0" in result.stderr, "a line for every step, since stderr is no terminal"
    assert "\nhip: nothing was pruned in 1,024 tokens" in result.stderr
    assert "paper:" not in result.stderr
    hip = next(line for line in result.stdout.splitlines() if "passkey" in line)
    assert hip.count("[") == 2, "Wilson's intervals of a score; none of a difference of two samples"


def test_eval_takes_the_models_context_and_says_what_it_did_not_do(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from hipserve.models import bundled_path

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8192}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bundled_path()).save_pretrained(tmp_path)
    result = invoke("eval", "perplexity", str(tmp_path))
    assert result.exit_code == 0
    assert "length: 1k tokens" in result.stderr
    assert "hip: nothing was pruned in 1,024 tokens" in result.stderr
    shown = " ".join(result.stdout.replace("│", " ").split())
    assert "needs 4 pieces" in shown
    assert "has 1" in shown
    tasks = ("--samples", "1", "--tasks", "passkey", "--form", "continuation", "--json")
    report = json.loads(invoke("eval", "retrieval", str(tmp_path), *tasks).stdout)
    assert (report["length"], report["form"]) == (1024, "continuation")
    assert report["results"][0]["difference"]["hip"]["interval"] is None


def test_demo_with_a_document_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "doc.txt"
    path.write_text("The heron waits by the river until the salmon come. " * 250)
    result = invoke("demo", "--doc", str(path), "--length", "3k", "--dense-length", "2k")
    assert result.exit_code == 0
    assert "4 of 4 answers right" in result.stdout
    assert all(fact.value in result.stdout for fact in FACTS)
    assert "reading the first 2,048 of the text's" in result.stderr
    for word in ("time to first token", "tokens/s", "keys read", "peak memory", "dense", "ratio"):
        assert word in result.stdout


def test_the_demo_takes_whole_numbers_only() -> None:
    lantern = next(fact for fact in FACTS if fact.value == "7350264")
    assert lantern.is_in("The special magic number for lantern is 7350264.")
    assert not lantern.is_in("The special magic number for lantern is 735026433759357.")


def test_demo_as_json() -> None:
    result = invoke("demo", "--length", "3k", "--dense-length", "2k", "--json")
    values: dict[str, Any] = json.loads(result.stdout)
    assert [answer["right"] for answer in values["answers"]] == [True] * 4
    assert values["peak_bytes"] > values["cache_bytes"] > 0
    comparison = values["comparison"]
    ratio = comparison["dense"]["first_token_seconds"] / comparison["hip"]["first_token_seconds"]
    assert comparison["first_token_ratio"] == ratio
    assert values["config"]["budget"] == 1024


def test_doctor_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("COLUMNS", raising=False)
    checks = json.loads(invoke("doctor", "--json").stdout)
    by_name = {check["name"]: check for check in checks}
    assert all(check["ok"] != bool(check["advice"]) for check in checks)
    assert by_name["dense result"]["ok"]
    assert by_name["bundled model"]["found"] == "acorn, 23.2 M parameters"
    table = invoke("doctor")
    assert table.exit_code == int(not all(check["ok"] for check in checks))
    assert max(len(line) for line in table.stdout.splitlines()) <= 100
    assert set(by_name["crossover on the CPU"]["found"].split()) <= set(table.stdout.split())
    assert json.loads(invoke("version", "--json").stdout)["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in invoke("version").stdout


def test_without_native_kernels_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from hipserve import platform

    missing = platform.NativeLibrary(None, "no compiler was there")
    monkeypatch.setattr(platform, "native_library", lambda: missing)
    result = invoke("doctor", "--json")
    assert result.exit_code == 1
    native = json.loads(result.stdout)[0]
    assert not native["ok"]
    assert native["found"] == "no compiler was there"
    assert "install gcc" in native["advice"]


def test_a_gpu_without_triton_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from hipserve import platform

    monkeypatch.setattr(platform, "gpu_name", lambda: "a card")
    monkeypatch.setattr(platform, "triton_library", lambda: "Triton is not installed")
    result = invoke("doctor", "--json")
    assert result.exit_code == 1
    gpu = json.loads(result.stdout)[-1]
    assert (gpu["ok"], gpu["found"]) == (False, "a card: Triton is not installed")
    assert "install triton" in gpu["advice"]


def test_interrupts_are_quiet() -> None:
    """Ctrl-C while a long document is read."""
    process = subprocess.Popen(
        [HIPSERVE, "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ,
        # A shell's background job ignores the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    first = process.stderr.readline()  # printed when the model is loaded
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in first + rest


def test_help_needs_no_heavy_import() -> None:
    """`hipserve --help` answers without loading transformers."""
    code = (
        "import sys; from hipserve.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("columns", [None, "60"])
def test_tables_lose_nothing_in_pipes_and_narrow_terminals(
    columns: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    table = Table(*(f"measure{i}" for i in range(9)))
    table.add_row(*(f"+{i}.1234567" for i in range(9)))
    output.show(table)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert columns or all(f"+{i}.1234567" in shown for i in range(9))
    assert all(len(line) <= int(columns or 400) for line in shown.splitlines())
