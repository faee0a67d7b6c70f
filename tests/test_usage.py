"""Wrong usage of the command: refused at once, with a sentence that names what was typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hipserve.cli import files, options
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
