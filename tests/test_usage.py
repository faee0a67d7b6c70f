"""Wrong usage of the command: refused at once, with a sentence that names what was typed."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import typer

import hipserve
from hipserve import FitError, HiPConfig
from hipserve.cli import files, options
from hipserve.cli.comparison import say_what_is_dense, title_of
from hipserve.cli.document import OpenDocument
from hipserve.cli.numbers import parse_share
from hipserve.errors import ArgumentError
from hipserve.lab import FidelityReport
from hipserve.lab.budgets.measure import sampled_blocks
from hipserve.lab.quality import passes
from hipserve.lab.samples import check_room
from hipserve.models import LoadedModel
from hipserve.plan import pruning_rule
from hipserve.platform import check_device
from shell import call, invoke, refused

SOURCE = Path(hipserve.__file__).parent


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused here is refused before a model is loaded."""

    def load(*_: object) -> None:
        raise InterruptedError("a model is loaded")

    monkeypatch.setattr(options, "load_model", load)


@pytest.mark.parametrize(
    "words",
    [
        ("calibrate", "--text", "{text}", "--out", "{new}/a.toml"),
        ("lab", "report", "--out", "{new}"),
        ("lab", "budgets", "--text", "{text}", "--out", "{new}/a.toml"),
        ("lab", "cache", "--svg", "{new}/a.svg"),
        ("lab", "representative", "--svg", "{new}/a.svg"),
    ],
)
def test_folders_are_made_before_anything_is_measured(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    text, new = tmp_path / "a.txt", tmp_path / "deep" / "new"
    text.write_text("Some text.")
    done = invoke(*(word.format(text=text, new=new) for word in words))
    assert isinstance(done.exception, InterruptedError)
    assert new.is_dir()


@pytest.mark.parametrize("file", ["taken/a.csv", "folder"])
def test_files_that_cannot_be_written_are_refused_first(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder").mkdir()
    words = ("bench", "attention", "--lengths", "1k", "--csv", str(tmp_path / file))
    code, line, _ = refused(monkeypatch, capsys, *words)
    assert code == 2
    assert line.startswith("error: --csv: expected a f")
    files.write("--csv", tmp_path / "more" / "b.csv", "1,2")
    assert (tmp_path / "more" / "b.csv").read_text() == "1,2"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--budget", "-5"), "-5 is negative"),
        (("--max-new-tokens", "-3"), "-3 is negative"),
        (("--max-new-tokens", "0"), "0 is less than 1"),
        (("--host-kv-memory", "24"), "24 is less than 1 MiB; did you mean 24G?"),
    ],
)
def test_numbers_out_of_range_are_named(words: tuple[str, ...], sentence: str) -> None:
    done = invoke("run", "--doc", __file__, *words, "Who?")
    assert done.exit_code == 2
    assert sentence in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("200%", "200% is not between 0% and 100%"),
        ("5", "did you mean 5%?"),
        ("-1", "-1 is not between 0% and 100%"),
        ("much", "write it as 0.5% or 0.005"),
    ],
)
def test_shares_out_of_range_are_named(text: str, sentence: str) -> None:
    with pytest.raises(typer.BadParameter, match=re.escape(sentence)):
        parse_share(text)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--extend-factor", "3"), "--extend-factor: expected --extend with it, got none"),
        (("--dense", "--extend", "yarn"), "--dense: expected no pruning options"),
    ],
)
def test_options_without_effect_are_refused(
    words: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, line, _ = refused(monkeypatch, capsys, "run", "--doc", __file__, *words, "Who?")
    assert code == 2
    assert line.startswith(f"error: {sentence}")


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "good.txt": b"Some text.",
        "empty.txt": b"",
        "blank.txt": b" \n\n",
        "binary.dat": bytes(range(256)),
        "latin.txt": "caf\u00e9".encode("latin-1"),
        "half.gz": gzip.compress(b"Rivers run to the sea." * 99)[:40],
        "bad.toml": b"budgte = 1",
    }.items():
        Path(name).write_bytes(content)
    Path("folder").mkdir()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("run --doc empty.txt Who?", "--doc: expected some text, got empty.txt (empty)"),
        ("chat --doc blank.txt", "--doc: expected some text, got blank.txt (empty)"),
        ("run --doc binary.dat Who?", "--doc: expected a readable UTF-8 text file, got binary.dat"),
        ("chat --doc latin.txt", "--doc: expected a readable UTF-8 text file, got latin.txt"),
        ("demo --doc half.gz", "--doc: expected a readable UTF-8 text file, got half.gz"),
        ("run --doc good.txt folder Who?", "(a directory without a config.json)"),
        ("run --doc good.txt good.txt Who?", "(a file of another kind)"),
        ("chat folder", "(a directory without a config.json)"),
        ("eval perplexity ./nowhere", "(no such directory)"),
        ("run --doc good.txt --dtype fp16 Who?", "--dtype: expected one of auto, bfloat16"),
        ("run --doc good.txt --pin-system Who?", "--pin-system: expected --system with it"),
        ("chat --pin-system", "--pin-system: expected --system with it"),
        ("eval perplexity --text nofile.txt", "--text: expected a readable UTF-8 text file"),
        ("lab cache --text nofile.txt", "--text: expected a readable UTF-8 text file"),
        ("calibrate --text nofile.txt", "--text: expected a readable UTF-8 text file"),
        ("lab drift --text empty.txt", "--text: expected some text, got empty.txt"),
        ("eval retrieval --tasks passkeyy", "--tasks: expected one of passkey"),
        ("lab depth --task nidle", "--task: expected one of passkey"),
        ("lab depth --task variables", "--task: expected a task whose answer is in one place"),
        ("lab depth --lengths 8k,0", "--lengths: expected 1 or more tokens, got 0"),
        ("bench attention --lengths 0", "--lengths: expected 1 or more tokens, got 0"),
        ("eval perplexity --length 2k --first 3k", "--first: expected a position from 1 to 2047"),
        ("lab quality --first 0", "--first: expected a position from 1 to 32767"),
        ("calibrate --text good.txt --first 40k", "--first: expected a position from 1 to 32767"),
        ("lab quality --documents x", "--documents: expected a slice"),
        ("lab drift --prompts no.jsonl", "--prompts: expected a readable UTF-8 text file"),
        ("lab speed --tiers foo", "--tiers: expected one of reference"),
        ("run --doc good.txt --budget 0 Who?", "--budget: expected"),
        ("run --doc good.txt --kv-file kv --dense Who?", "--dense: expected no offloading"),
        ("run --doc good.txt --config good.txt Who?", "--config: expected"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    words: str,
    sentence: str,
    texts: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, line, _ = refused(monkeypatch, capsys, *words.split())
    assert (code, line[:7]) == (2, "error: ")
    assert sentence in line


def test_fields_of_a_file_are_named_as_they_are_written_there(
    texts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what was typed is called an option."""
    Path("zero.toml").write_text("budget = 0")
    words = ("run", "--doc", "good.txt", "--config", "zero.toml", "Who?")
    assert refused(monkeypatch, capsys, *words)[1].startswith("error: budget: expected")


@pytest.mark.parametrize(
    ("version", "sentence"),
    [(None, "(this torch has no CUDA)"), ("13.0", "(no CUDA GPU is visible)")],
)
@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_here_is_explained(
    device: str, version: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.version.cuda", version)
    with pytest.raises(ArgumentError, match=re.escape(f"expected cpu, got '{device}' {sentence}")):
        check_device(device)


def test_a_long_document_is_read_once_and_in_order(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(300_000)).encode()
    for name, content in (("plain", text), ("packed.gz", gzip.compress(text, 1))):
        (tmp_path / name).write_bytes(content)
        assert OpenDocument(str(tmp_path / name)).read(len(text) + 1) == text
        assert OpenDocument(str(tmp_path / name)).read(2_000_000) == text[:2_000_000]


@pytest.mark.parametrize("command", ["run", "chat"])
def test_ctrl_c_while_the_command_is_imported_is_quiet(command: str, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    done = call(command, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_what_is_counted_agrees_with_its_noun() -> None:
    report = SimpleNamespace(model="m", first=512, length=2048, documents=["one"])
    assert title_of(cast(FidelityReport, report)) == "m, positions 512 to 2k, 1 document"
    plural = re.compile(r"\{len\([^}]*\)\} (documents|texts|prompts)\b|\.rows\} rows|s\} prompts")
    sources = [p for folder in ("cli", "lab") for p in (SOURCE / folder).rglob("*.py")]
    assert [f"{p.name}: {found}" for p in sources for found in plural.findall(p.read_text())] == []


def test_where_nothing_is_pruned_numbers_to_try_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = HiPConfig(budget=1024, num_sink_tokens=64, sliding_window=512, dense_below=0)
    for ask in (
        lambda tried, length: check_room(length, tried, 256),
        lambda tried, length: sampled_blocks(tried, length, "cpu"),
    ):
        with pytest.raises(FitError) as error:
            ask(config, 1536)
        found = re.fullmatch(r"try a length of ([\d,]+) tokens or --budget (\d+)", error.value.hint)
        assert found, error.value.hint
        assert ask(config, int(found[1].replace(",", "")))
        assert ask(config.replace(budget=int(found[2])), 1536)
    rule = pruning_rule(config, "cpu")
    monkeypatch.setattr(passes, "rule_of_model", lambda *_: rule)
    monkeypatch.setattr(passes, "may_prune", lambda _, tried, n: tried.budget + 1024 <= n)
    loaded = cast(LoadedModel, SimpleNamespace(max_context=3072))
    say_what_is_dense(loaded, {"hip": config}, 1536)
    assert capsys.readouterr().err.endswith("try a length of 2,048 tokens or --budget 512\n")
