"""Texts that every installation has: licences of its packages, Python's own library, docstrings.

Licences and the library repeat themselves word for word, where a search that is not good enough
shows. All differ between installations: a number measured on them holds for the place it was
measured in.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

PART = 200_000
"""Characters of a document: more than 32k tokens, so that there are several of them."""
MOST = 12
LICENSE = re.compile(r"(licen[cs]e|copying|notice)[^/]*$", re.IGNORECASE)
SENTENCES = re.compile(r"[A-Z][A-Za-z0-9 ,.;:'\"()-]+[.]")
WORDS = 25
"""Words of a paragraph of prose, at least."""
FORMULA = ".. math::"
NO_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}


def licenses() -> Iterator[str]:
    """Documents of the licences of installed packages, one after the other, by name."""
    return _parts(_read(_license_files()))


def sources() -> Iterator[str]:
    """Documents of Python's standard library, file by file."""
    return _parts(_read(_library_files()))


def prose() -> Iterator[str]:
    """Paragraphs of whole sentences from the docstrings of Python's standard library."""
    for docstring in _docstrings(_read(_library_files())):
        for paragraph in re.split(r"\n\s*\n", docstring):
            line = " ".join(paragraph.split())
            if len(line.split()) >= WORDS and SENTENCES.fullmatch(line):
                yield f"{line}\n\n"


def mathematics() -> Iterator[str]:
    """Docstrings with formulas of SymPy, which comes with torch; none where it is not installed."""
    found = importlib.util.find_spec("sympy")
    folders = (found and found.submodule_search_locations) or ()
    files = (file for folder in folders for file in sorted(Path(folder).rglob("*.py")))
    sources = (source for source in _read(files) if FORMULA in source)
    return (f"{text}\n\n" for text in _docstrings(sources) if FORMULA in text)


def _library_files() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    return (f for f in files if not NO_LIBRARY & {*f.relative_to(root).parts})


def _docstrings(sources: Iterable[str]) -> Iterator[str]:
    for source in sources:
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in code of others
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


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
