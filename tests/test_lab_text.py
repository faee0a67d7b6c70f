"""Texts of the installation: there are some, they are the same each time, and they repeat."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hipserve import ArgumentError, FitError
from hipserve.lab import installed, read_documents

SIZE = 20_000


@pytest.mark.parametrize("name", ["@licenses", "@sources"])
def test_texts_of_the_installation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "PART", SIZE)
    found = read_documents([name])
    assert found == read_documents([name])
    assert 4 <= len(found) <= installed.MOST
    assert {len(document.text) for document in found} == {SIZE}
    assert {document.domain for document in found} == {name[1:]}
    assert len({document.name for document in found}) == len(found)


def test_licenses_repeat_and_sources_are_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "PART", 100_000)
    (text, *_) = installed.licenses()
    lines = [line for line in text.splitlines() if len(line) > 40]
    assert len(set(lines)) < 0.9 * len(lines)
    assert "WARRANTIES" in text
    assert "import " in next(installed.sources())


def test_prose_has_no_code_and_mathematics_has_formulas() -> None:
    prose = list(itertools.islice(installed.prose(), 40))
    assert all(len(text.split()) >= installed.WORDS for text in prose)
    assert not any(mark in text for text in prose for mark in (">>>", "def ", "=", "_", "\n "))
    formulas = list(itertools.islice(installed.mathematics(), 5))
    assert len(formulas) == 5
    assert all(".. math::" in text for text in formulas)


def test_code_that_does_not_parse_has_no_docstring() -> None:
    assert list(installed._docstrings(['"""One."""', "def (", "\0", '"""Two \\d."""'])) == [
        "One.",
        "Two \\d.",
    ]


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="expected @licenses or @sources, got @license"):
        read_documents(["@license"])
    monkeypatch.chdir(tmp_path)
    Path("@licenses").write_text("a file")
    assert read_documents([Path("./@licenses").absolute()])[0].text == "a file"
    monkeypatch.setattr(installed, "PART", 10**9)
    with pytest.raises(FitError, match="less than 1,000,000,000 characters"):
        read_documents(["@licenses"])


def test_files_that_are_gone_or_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "PART", 10)
    (tmp_path / "a").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "b").write_text("0123456789012345")
    files = [tmp_path / name for name in ("a", "gone", "b", "b")]
    assert list(installed._parts(installed._read(files))) == [
        "0123456789",
        "012345\n\n01",
        "2345678901",
    ]
