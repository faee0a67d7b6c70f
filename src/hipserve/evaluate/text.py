"""Texts to measure on: plain files, JSON lines, and the one text that every CPython carries."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hipserve.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with the name and the domain that results are listed under."""

    name: str
    domain: str
    text: str


def read_documents(paths: Sequence[str | Path] = ()) -> list[Document]:
    """Documents of text files, and of `.jsonl` files with `text` and optionally `title`, `domain`.

    Without a path: the Python language reference of this CPython (`pydoc_data.topics`).

    Raises:
        ArgumentError: a file cannot be read, or a line holds no text.
    """
    if not paths:
        return [Document("pydoc_data.topics", "docs", language_reference())]
    return [document for path in paths for document in _read(Path(path))]


def language_reference() -> str:
    """The Python language reference, some 465,000 characters of English (CPython 3.11)."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """The text of one file.

    Raises:
        ArgumentError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(str(path), error.strerror or str(error)) from error
    return decode_text(content, str(path))


def decode_text(content: bytes, source: str) -> str:
    """Bytes as text; `source` names them in errors, which are those of `read_text`."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(source, "not UTF-8 text") from error
    if not text.strip():
        raise ArgumentError("file", "some text", f"{source} (empty)", "choose another file")
    return text


def _unreadable(source: str, reason: str) -> ArgumentError:
    return ArgumentError(
        "file", "a readable UTF-8 text file", f"{source} ({reason})", "check the path"
    )


def _read(path: Path) -> list[Document]:
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [Document(path.name, path.suffix.lstrip(".") or "text", text)]
    return [
        _parse(line, path, number)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]


def _parse(line: str, path: Path, number: int) -> Document:
    try:
        values: Any = json.loads(line)
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        raise ArgumentError(
            "file",
            'one JSON object with a "text" on each line',
            f"{path} line {number}",
            "correct the line",
        )
    fields = cast("dict[str, str]", values)
    name = str(fields.get("title") or fields.get("id") or f"{path.name}:{number}")
    return Document(name, str(fields.get("domain") or path.stem), fields["text"])
