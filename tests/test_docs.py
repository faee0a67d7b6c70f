"""What the documentation shows works: code runs, commands parse, links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import hipserve
from hipserve.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page; the language of a plain fence is empty."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    return [content for language, content in fenced if language in languages]


CODE = [
    pytest.param(code, id=f"{page.name} {i}")
    for page in PAGES
    for i, code in enumerate(blocks(page, "python"))
]
COMMANDS = [
    pytest.param(line.split("#")[0], id=line)
    for page in PAGES
    for block in blocks(page, "", "console", "sh", "bash", "shell")
    for line in block.splitlines()
    if line.startswith("hipserve ")
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODULES = [
    info.name
    for info in pkgutil.walk_packages(hipserve.__path__, "hipserve.")
    if not re.search(r"_cpu$|vllm|triton|gather", info.name)
]


@pytest.mark.parametrize("code", CODE)
def test_code_runs(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of a running server are only compiled: the tests of the server run them."""
    monkeypatch.chdir(ROOT)
    program = compile(code, "documentation", "exec")
    if "base_url=" not in code:
        exec(program, {"__name__": "documentation"})


def test_there_is_something_to_test() -> None:
    assert len(CODE) >= 3
    assert len(COMMANDS) >= 5
    assert len(EXAMPLES) == 3
    assert len(MODULES) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    """Every word is a command, an option or a value of the right type."""
    command = re.sub(r"\\\n|\s\|.*|\s>.*|\s&$", " ", command)
    parse(typer.main.get_command(app), shlex.split(command)[1:])


def parse(command: Any, words: list[str]) -> None:
    if hasattr(command, "commands"):
        assert words, "a group needs a command"
        assert words[0] in command.commands, words
        parse(command.commands[words[0]], words[1:])
    elif "--help" not in words:
        command.make_context(command.name, words)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", prose(page)):
        if not target.startswith("https://"):
            aim = page.parent / target if target else page
            assert aim.exists(), target
            assert not heading or heading in headings(aim), f"{target}#{heading}"


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)


def headings(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pages
def test_files_that_pages_name_are_there(page: Path) -> None:
    folders = "src|csrc|tests|benchmarks|docs|examples"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text("utf-8"))
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert missing == []


def test_the_reference_says_what_the_code_says() -> None:
    pytest.importorskip("vllm")
    generate = runpy.run_path(str(ROOT / "docs/generate.py"))
    assert generate["PAGE"].read_text("utf-8") == generate["page"](), "make docs"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example: Path) -> None:
    done = subprocess.run(
        [sys.executable, example], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = {
        "library.py": "maximum difference",
        "transformers_generate.py": "the same tokens as dense attention: True",
        "chat_over_a_file.py": "The pass key is 83724.",
    }
    assert expected.get(example.name, "") in done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert not failed


def test_there_are_docstring_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    module = importlib.import_module("hipserve.attention.hip")
    assert any(test.examples for test in finder.find(module))


def test_structure_has_a_sentence_for_every_file() -> None:
    text = (ROOT / "docs/structure.md").read_text("utf-8")
    told = dict(re.findall(r"^- `([^`]+)`: (.+)$", text, re.M))
    native = (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    there = {str(path.relative_to(ROOT)) for path in native}
    for path in (ROOT / "src/hipserve").rglob("*.py"):
        if path.name != "__init__.py" or path.parent.name == "hipserve":
            there.add(str(path.relative_to(ROOT)))
    there.add("src/hipserve/models/acorn/")
    assert set(told) == there
    assert all(sentence.endswith(".") for sentence in told.values())
