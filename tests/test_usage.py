"""Wrong usage of the command: refused at once, with a sentence that names what was typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from hipserve.cli import files, options
from hipserve.cli.numbers import parse_share
from shell import invoke, refused


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
