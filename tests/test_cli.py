"""The command: results on stdout, progress on stderr, sentences for errors, codes for exits."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import typing
from pathlib import Path

import pytest
import typer

from hipserve.cli import main as command
from hipserve.cli import options
from hipserve.cli.numbers import format_bytes, format_count, parse_count, parse_counts
from hipserve.lab import text
from hipserve.lab.quality.tasks import PASS_KEY_QUESTION, pass_key
from hipserve.presets import PRESETS
from shell import HIPSERVE, call, invoke, refused

FACT, QUESTION = pass_key("83724"), PASS_KEY_QUESTION


@pytest.fixture
def doc(tmp_path: Path) -> str:
    path = tmp_path / "doc.txt"
    path.write_text(f"Rivers run to the sea.\n{FACT}\nHills do not.\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("4_096", 4096), ("32k", 32768), ("1.5K", 1536), ("1M", 2**20), (7, 7)],
)
def test_counts_as_people_write_them(text: str | int, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.3", "32kb", "1e3", "nan", "9" * 400 + "k"])
def test_other_counts_are_wrong_usage(text: str, doc: str) -> None:
    result = invoke("run", QUESTION, "--doc", doc, f"--budget={text}")
    assert result.exit_code == 2
    assert "no number" in " ".join(result.stderr.replace("│", " ").split())


def test_counts_as_the_command_writes_them() -> None:
    assert [format_count(n) for n in (1, 1000, 1024, 66 * 1024, 2**20, 1537)] == [
        "1",
        "1000",
        "1k",
        "66k",
        "1M",
        "1537",
    ]
    assert format_bytes(492 * 2**20) == "492 MiB"
    assert format_bytes(1.5 * 2**30) == "1.50 GiB"
    assert parse_counts("8k,16k") == [8192, 16384]


def test_run_answers_on_stdout_and_reports_on_stderr(doc: str) -> None:
    result = invoke("run", QUESTION, "--doc", doc)
    assert result.exit_code == 0
    assert result.stdout == "The pass key is 83724.\n"
    assert "keys read: 100.0% in prefill" in result.stderr
    assert "attention: cpu (" in result.stderr or "attention: reference" in result.stderr


def test_run_answers_a_question_without_a_document() -> None:
    result = invoke("run", f"{FACT}\n\n{QUESTION}")
    assert (result.exit_code, result.stdout) == (0, "The pass key is 83724.\n")


def test_run_as_json(doc: str) -> None:
    result = invoke("run", "acorn", QUESTION, "--doc", doc, "--json")
    values = json.loads(result.stdout)
    assert values["answer"] == "The pass key is 83724."
    assert values["model"] == "acorn"
    assert values["new_tokens"] > 5
    assert values["cached_tokens"] == 0
    assert 0 < values["first_token_seconds"] < 60
    assert values["prefill_share"] == values["decode_share"] == 1.0


def test_run_reads_stdin_and_any_checkpoint_directory() -> None:
    from hipserve.models.loading import bundled_path

    where = str(bundled_path())
    result = invoke("run", where, QUESTION, "--doc", "-", "--dense", stdin=FACT)
    assert "83724" in result.stdout
    assert "attention: torch SDPA" in result.stderr


def test_run_samples_the_same_with_the_same_seed(doc: str) -> None:
    options = ("--doc", doc, "--temperature", "3", "--max-new-tokens", "12")
    answers = [invoke("run", QUESTION, *options, "--seed", s).stdout for s in ("1", "1", "2")]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_chat_reads_only_what_is_new(doc: str) -> None:
    result = invoke("chat", "--doc", doc, stdin=f"{QUESTION}\n{QUESTION}\n\nnot read\n")
    assert result.exit_code == 0
    assert result.stdout == "The pass key is 83724.\n" * 2
    assert "(0 already read)" in result.stderr
    assert "(0 already read)" not in result.stderr.splitlines()[-2]


def test_a_config_file_counts(doc: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("budget = 32\nsliding_window = 16\nnum_sink_tokens = 16\ndense_below = 0\n")
    long = tmp_path / "long.txt"
    long.write_text("Rivers run to the sea. " * 60)
    options = ("--doc", str(long), "--json", "--config", str(path))
    values = json.loads(invoke("run", QUESTION, *options, "--max-new-tokens", "2").stdout)
    assert values["prefill_share"] < 0.9
    more = json.loads(
        invoke("run", QUESTION, *options, "--max-new-tokens", "2", "--budget", "128").stdout
    )
    assert values["prefill_share"] < more["prefill_share"]


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no such file": (["run", "q", "--doc", "missing.txt"], 2, "No such file"),
    "a directory": (["run", "q", "--doc", "."], 2, "Is a directory"),
    "no text": (["run", "q", "--doc", "binary"], 2, "not UTF-8"),
    "an empty file": (["run", "q", "--doc", "empty"], 2, "empty"),
    "no such model": (["run", "acron", "q", "--doc", "doc"], 2, "model: expected"),
    "no such directory": (["run", "./acron", "q", "--doc", "doc"], 2, "no such directory"),
    "no model in it": (["run", "./sub", "q", "--doc", "doc"], 2, "model: expected"),
    "too long": (["run", "q", "--doc", "long"], 3, "its context is 131,072"),
    "too long an answer": (
        ["run", "q", "--doc", "doc", "--max-new-tokens", "128k"],
        3,
        "its context is 131,072 / set max_new_tokens to 131,0",
    ),
    "an endless file": (["run", "q", "--doc", "/dev/zero"], 3, "/dev/zero does not fit acorn"),
    "an endless talk": (["chat", "--doc", "/dev/zero"], 3, "/dev/zero does not fit acorn"),
    "endless text": (["eval", "perplexity", "--text", "/dev/zero"], 3, "more than 1,048,576 bytes"),
    "half an archive": (["run", "q", "--doc", "half.gz"], 2, "end-of-stream"),
    "no file name": (["run", "q", "--doc", ""], 2, "the name of a text file, got ''"),
    "the demo's file without a name": (["demo", "--doc", ""], 2, "the name of a text file, got ''"),
    "bytes as a question": (["run", "\udcff", "--doc", "doc"], 2, "expected UTF-8 text, got"),
    "no model's name": (["run", "", "q", "--doc", "doc"], 2, "model: expected"),
    "too long to talk about": (["chat", "--doc", "long"], 3, "its context is 131,072"),
    "no question": (["run", " ", "--doc", "doc"], 2, "question: expected"),
    "a config that is missing": (["run", "q", "--doc", "doc", "--config", "no.toml"], 2, "config:"),
    "a config that is no TOML": (["run", "q", "--doc", "doc", "--config", "doc"], 2, "config:"),
    "an unknown key": (["run", "q", "--doc", "doc", "--config", "key.toml"], 2, "budgte: expected"),
    "a field that is near": (
        ["run", "q", "--doc", "doc", "--config", "key.toml"],
        2,
        "/ did you mean budget?",
    ),
    "a section": (["run", "q", "--doc", "doc", "--config", "section.toml"], 2, "without [hip]"),
    "YAML": (["run", "q", "--doc", "doc", "--config", "c.yaml"], 2, "a TOML or JSON file"),
    "half a block": (["run", "q", "--doc", "doc", "--budget", "8"], 2, "budget: expected"),
    "a selector": (["run", "q", "--doc", "doc", "--selector", "quest"], 2, "selector: expected"),
    "a preset": (["run", "q", "--doc", "doc", "--preset", "none"], 2, "preset: expected"),
    "a preset beside a file": (
        ["run", "q", "--doc", "doc", "--config", "ok.toml", "--preset", "fast"],
        2,
        "preset: expected",
    ),
    "a budget beside dense": (
        ["run", "q", "--doc", "doc", "--dense", "--budget", "512"],
        2,
        "dense: expected",
    ),
    "a dtype": (["run", "q", "--doc", "doc", "--dtype", "int4"], 2, "dtype: expected"),
    "a device": (["run", "q", "--doc", "doc", "--device", "tpu"], 2, "device: expected"),
    "a form": (["eval", "retrieval", "--form", "poem"], 2, "form: expected chat or continuation"),
    "a task": (["eval", "retrieval", "--tasks", "passkey,pi", "--length", "1k"], 2, "--tasks:"),
    "a context": (["eval", "retrieval", "--length", "1M"], 3, "its context is 131,072"),
    "a haystack": (["eval", "retrieval", "--length", "1k", "--text", "doc"], 3, "too short"),
    "a text": (["eval", "perplexity", "--length", "1k", "--text", "doc"], 3, "longest document"),
    "a line of JSON": (["eval", "perplexity", "--text", "bad.jsonl"], 2, "bad.jsonl line 1"),
    "no values": (["eval", "perplexity", "--vary", "budget"], 2, "vary: expected"),
    "a value": (["eval", "perplexity", "--vary", "budget=1k,x"], 2, "budget: expected"),
    "a field": (["eval", "perplexity", "--vary", "bugdet=1k"], 2, "bugdet: expected"),
    "a preset as a value": (["eval", "perplexity", "--vary", "preset=fast"], 2, "preset: expected"),
    "no length": (["eval", "perplexity", "--length", "0"], 2, "length: expected"),
    "no tokens after the first": (
        ["eval", "perplexity", "--length", "1k", "--first", "1k"],
        2,
        "first: expected a position from 1 to 1023",
    ),
    "another preset": (["eval", "perplexity", "--also", "none"], 2, "preset: expected"),
    "the demo's file": (["demo", "--doc", "missing.txt"], 2, "No such file"),
    "the demo's length": (["demo", "--length", "100"], 2, "length: expected"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence(
    mistake: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "MAX_BYTES", 1 << 20)
    for name, content in {
        "doc": b"Rivers run to the sea.",
        "binary": bytes(range(256)),
        "empty": b"\n",
        "long": b"river " * 140_000,
        "key.toml": b"budgte = 1\n",
        "ok.toml": b"budget = 512\n",
        "bad.jsonl": b'{"title": "no text"}\n',
        "section.toml": b"[hip]\nbudget = 512\n",
        "c.yaml": b"budget: 512\n",
        "half.gz": gzip.compress(b"Rivers run to the sea." * 99)[:40],
    }.items():
        Path(name).write_bytes(content)
    Path("sub").mkdir()
    words, code, part = MISTAKES[mistake]
    got, line, hint = refused(monkeypatch, capsys, *words)
    assert (got, line[:7]) == (code, "error: ")
    assert part in f"{line} / {hint}"


WRONG_USAGE: dict[str, tuple[list[str], str]] = {
    "two documents": (["run", "q", "--doc", "a", "--doc=b"], "--doc given 2 times"),
    "two ports": (["serve", "--port", "1", "--port", "2"], "--port given 2 times"),
    "two lengths": (["eval", "retrieval", "--length=1k", "--length", "2k"], "--length given 2"),
    "two rounds": (["bench", "attention", "--rounds", "1", "--rounds", "1"], "--rounds given 2"),
    "yes and no": (
        ["serve", "--allow-unauthenticated", "--no-allow-unauthenticated"],
        "--allow-unauthenticated and --no-allow-unauthenticated given 2 times",
    ),
    "no tokens": (["run", "q", "--doc", "a", "--max-new-tokens", "0"], "0 is less than 1"),
    "no number": (["eval", "retrieval", "--samples", "many"], "'many' is no number"),
    "infinitely hot": (["run", "q", "--doc", "a", "--temperature", "inf"], "neither 0"),
    "almost greedy": (["run", "q", "--doc", "a", "--temperature", "1e-40"], "neither 0"),
    "a huge seed": (["chat", "--seed", "9" * 23], "--seed"),
    "no config's name": (["run", "q", "--doc", "a", "--config", ""], "the file name is empty"),
    "no text's name": (["eval", "perplexity", "--text", ""], "the file name is empty"),
    "no table's name": (["bench", "attention", "--csv", ""], "the file name is empty"),
}


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage_is_named(case: str) -> None:
    words, part = WRONG_USAGE[case]
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert part in " ".join(result.stderr.replace("│", " ").split())


def test_an_option_as_another_ones_value_is_not_a_second_one(doc: str) -> None:
    """`--doc --json`: the file's name is `--json`; switches and repeatable options may repeat."""
    result = invoke("run", QUESTION, "--doc", "--doc", "--json", "--json")
    assert "given" not in result.stderr
    result = invoke("eval", "perplexity", "--text", doc, "--text", doc, "--length", "8")
    assert "given" not in result.stderr


@pytest.mark.parametrize("option", ["--max-new-tokens", "--budget"])
def test_counts_may_have_a_suffix(option: str, doc: str) -> None:
    assert invoke("run", QUESTION, "--doc", doc, option, "1k").stdout == "The pass key is 83724.\n"


def test_every_count_takes_a_suffix() -> None:
    """No option for a whole number is left to int(), which knows no 1k."""
    seen: list[str] = []

    def check(group: typer.Typer) -> None:
        for one in group.registered_commands:
            hints = typing.get_type_hints(one.callback, include_extras=True)
            for name, hint in hints.items():
                kind, *extras = typing.get_args(hint) or (hint,)
                if kind in (int, int | None) and name not in ("port", "seed"):
                    seen.append(name)
                    assert extras, name
                    factor = 1000 if extras[0].metavar == "SIZE" else 1024  # 1KiB is 1024 bytes
                    assert extras[0].parser("2000k") == 2000 * factor, name
        for sub in group.registered_groups:
            assert sub.typer_instance is not None
            check(sub.typer_instance)

    check(command.app)
    assert {"max_new_tokens", "budget", "length", "samples", "rounds", "repeats"} <= set(seen)


@pytest.mark.parametrize(
    "words",
    [
        *("", "run", "chat", "demo", "serve", "doctor", "version", "bench", "eval", "lab"),
        *("bench attention", "bench serve", "eval retrieval", "eval perplexity", "lab quality"),
        "lab cache",
        "lab representative",
        "lab locality",
        "lab meter",
        "lab budgets",
        "lab report",
    ],
)
def test_h_is_help(words: str) -> None:
    short, long = invoke(*words.split(), "-h"), invoke(*words.split(), "--help")
    assert short.exit_code == 0
    assert "Usage: " in short.stdout
    assert short.stdout == long.stdout


def test_help_names_every_preset() -> None:
    assert typing.get_args(options.Preset)[1].help == "default, fast, accurate, paper."
    assert list(PRESETS) == ["default", "fast", "accurate", "paper"]


def test_version_as_an_option() -> None:
    from importlib.metadata import version

    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"hipserve {version('hipserve')}\n")


def test_a_packed_document_is_unpacked(tmp_path: Path) -> None:
    packed = gzip.compress(FACT.encode())
    path = tmp_path / "doc.txt.gz"
    path.write_bytes(packed)
    assert invoke("run", QUESTION, "--doc", str(path)).stdout == "The pass key is 83724.\n"
    assert call("run", QUESTION, "--doc", "-", stdin=packed).stdout == "The pass key is 83724.\n"


def test_an_endless_pipe_is_left_when_nothing_as_long_fits(tmp_path: Path) -> None:
    """It is read up to the longest text that the context could hold, and no further."""
    script = 'yes "no end" | "$0" run "What is it?" --doc -'
    done = subprocess.run(["bash", "-c", script, HIPSERVE], capture_output=True, timeout=240)
    assert done.returncode == 3
    assert b"error: stdin does not fit acorn: it has more than" in done.stderr


def test_closed_streams_get_a_sentence(doc: str) -> None:
    for redirect, words in (
        ("<&-", ("run", QUESTION, "--doc", "-")),
        ("<&-", ("chat",)),
        (">&-", ("version",)),
        (">&-", ("doctor", "--json")),
    ):
        script = f'"$0" "$@" {redirect}'
        done = subprocess.run(
            ["bash", "-c", script, HIPSERVE, *words], capture_output=True, timeout=240
        )
        assert re.match(rb"error: std(in|out)(:| is)", done.stderr), done.stderr
        assert done.returncode in (1, 2)


def test_a_locale_without_utf_8_still_reads_and_writes_it(doc: str) -> None:
    words = ("run", "Where is the caf\u00e9?", "--doc", doc)
    done = call(*words, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0
    assert done.stdout == call(*words, LC_ALL="C.UTF-8").stdout
    done = call("chat", stdin=b"\xff\n", PYTHONIOENCODING="utf-8:strict")
    assert (done.returncode, done.stdout) == (0, "")  # refused, and the conversation goes on
    assert "expected UTF-8 text" in done.stderr


def test_wrong_usage_and_unknown_commands() -> None:
    for words in (["nosuch"], ["run"], ["run", "a", "b", "c", "--doc", "d"]):
        result = invoke(*words)
        assert result.exit_code == 2, words
        assert result.stdout == ""
        assert "Usage: " in result.stderr


def test_a_reader_that_leaves_early_is_no_error(doc: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [HIPSERVE, "run", QUESTION, "--doc", doc],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=240,
    )
    os.close(writing)
    assert b"Traceback" not in done.stderr
    assert b"Error" not in done.stderr


def test_a_process_prints_as_the_runner_does(doc: str) -> None:
    done = call("run", QUESTION, "--doc", "-", stdin=FACT.encode(), NO_COLOR="1")
    assert (done.returncode, done.stdout) == (0, "The pass key is 83724.\n")
    assert len(done.stderr.splitlines()) == 1
    done = call("run", QUESTION, "--doc", "-", stdin=b"\xff")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --doc: expected")
