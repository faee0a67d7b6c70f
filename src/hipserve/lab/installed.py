"""Texts that every installation has: the licences of its packages and Python's own library.

Both repeat themselves word for word, where a search that is not good enough shows. They differ
between installations: a number measured on them holds for the place it was measured in.
"""

from __future__ import annotations

import importlib.metadata
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

PART = 200_000
"""Characters of a document: more than 32k tokens, so that there are several of them."""
MOST = 12
LICENSE = re.compile(r"(licen[cs]e|copying|notice)[^/]*$", re.IGNORECASE)
NO_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}


def licenses() -> Iterator[str]:
    """Documents of the licences of installed packages, one after the other, by name."""
    return _parts(_read(_license_files()))


def sources() -> Iterator[str]:
    """Documents of Python's standard library, file by file."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    return _parts(_read(f for f in files if not NO_LIBRARY & {*f.relative_to(root).parts}))


def _license_files() -> Iterator[Path]:
    named = {
        str(d.metadata["Name"]).lower(): d for d in importlib.metadata.distributions()
    }  # a broken one has no name
    for _, distribution in sorted(named.items()):
        for file in distribution.files or ():
            if LICENSE.search(str(file)) and file.suffix != ".py":
                yield Path(str(distribution.locate_file(file)))


def _read(files: Iterable[Path]) -> Iterator[str]:
    """What of them is there and text: a package may list files that are gone."""
    for file in files:
        try:
            yield file.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def _parts(texts: Iterable[str]) -> Iterator[str]:
    """Texts joined until they make `PART` characters, at most `MOST` times; a short rest goes."""
    joined, made = "", 0
    for text in texts:
        joined += text + "\n\n"
        while len(joined) >= PART and made < MOST:
            yield joined[:PART]
            joined, made = joined[PART:], made + 1
        if made == MOST:
            return
