"""Texts to measure on: plain files, JSON lines, and the one text that every CPython carries."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from hipserve.errors import ArgumentError, FitError, did_you_mean
from hipserve.lab import installed

MAX_BYTES = 1 << 30
"""Maximum bytes of a text to measure on: a file may be endless."""
GZIP = b"\x1f\x8b"
PART = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with the name and the domain that results are listed under."""

    name: str
    domain: str
    text: str


def read_documents(paths: Sequence[str | Path] = ()) -> list[Document]:
    """Documents of text files, and of `.jsonl` files with `text` and optionally `title`, `domain`.

    `@licenses` and `@sources` are texts of this installation that repeat themselves
    (`hipserve.lab.installed`); a file of that name is `./@licenses`. Without a path: the Python
    language reference of this CPython (`pydoc_data.topics`).

    Raises:
        ArgumentError: a file cannot be read, a line holds no text, or there is no such @ text.
    """
    if not paths:
        return [Document("pydoc_data.topics", "docs", language_reference())]
    return [document for path in paths for document in _documents(path)]


def _documents(path: str | Path) -> list[Document]:
    name = str(path)
    if not name.startswith("@"):
        return _read(Path(path))
    known = {"@licenses": installed.licenses, "@sources": installed.sources}
    if name not in known:
        raise ArgumentError("file", " or ".join(known), name, did_you_mean(name, list(known)))
    parts = [Document(f"{name} {i}", name[1:], text) for i, text in enumerate(known[name]())]
    if not parts:
        raise FitError(
            f"{name}: what is installed here has less than {installed.PART:,} characters of them",
            "give a file",
        )
    return parts


def language_reference() -> str:
    """The Python language reference, some 465,000 characters of English (CPython 3.11)."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """The text of one file, of at most `MAX_BYTES`; gzip is unpacked.

    Raises:
        ArgumentError: it cannot be read, is not UTF-8, or is empty.
        FitError: it is longer.
    """
    with open_text(path) as stream:
        content = read_bytes(stream, str(path), MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise FitError(f"{path} has more than {MAX_BYTES:,} bytes", "give a shorter text")
    return decode_text(content, str(path))


def open_text(path: str | Path) -> BinaryIO:
    """The file, opened.

    Raises:
        ArgumentError: there is none, or it cannot be read.
    """
    if not str(path).strip():
        raise ArgumentError("file", "the name of a text file", repr(str(path)))
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), getattr(error, "strerror", None) or str(error)) from error


def read_bytes(stream: BinaryIO, source: str, count: int) -> bytes:
    """The first `count` bytes of a stream, unpacked if it is gzip's."""
    with contextlib.closing(read_parts(stream, source)) as parts:
        return first_bytes(parts, count)


def first_bytes(parts: Iterator[bytes], count: int) -> bytes:
    """The first `count` bytes of some parts; those behind are not asked for."""
    taken, size = list[bytes](), 0
    while size < count and (part := next(parts, b"")):
        taken.append(part)
        size += len(part)
    return b"".join(taken)[:count]


def read_parts(stream: BinaryIO, source: str) -> Generator[bytes]:
    """A stream in parts of `PART` bytes, unpacked if it is gzip's; the last may be shorter.

    Raises:
        ArgumentError: it cannot be read; `source` names it.
    """
    buffered = io.BufferedReader(cast("io.RawIOBase", stream))
    try:
        packed = buffered.peek(len(GZIP)).startswith(GZIP)
        unpacked = gzip.GzipFile(fileobj=buffered) if packed else buffered
        while part := unpacked.read(PART):
            yield part
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(source, getattr(error, "strerror", None) or str(error)) from error
    finally:
        with contextlib.suppress(ValueError):  # the stream is closed already
            buffered.detach()  # or it would close the stream


def decode_text(content: bytes, source: str, *, cut: bool = False) -> str:
    """Bytes as text; `source` names them in errors, which are those of `read_text`.

    `cut`: the bytes may end inside of a character, which is left out.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=not cut)
    except UnicodeDecodeError as error:
        raise _unreadable(source, "not UTF-8 text") from error
    if not text.strip():
        raise ArgumentError("file", "some text", f"{source} (empty)")
    return text


def _unreadable(source: str, reason: str) -> ArgumentError:
    return ArgumentError("file", "a readable UTF-8 text file", f"{source} ({reason})")


def _read(path: Path) -> list[Document]:
    text = read_text(path)
    if path.suffix == ".gz":
        path = path.with_suffix("")
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
        )
    fields = cast("dict[str, str]", values)
    name = str(fields.get("title") or fields.get("id") or f"{path.name}:{number}")
    return Document(name, str(fields.get("domain") or path.stem), fields["text"])
