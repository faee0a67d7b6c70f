"""Rules of the house that no linter knows: lengths of files, shapes in documentation."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hipserve import HiPConfig, hip_attention

ROOT = Path(__file__).parent.parent
LONGEST = 400
LONGEST_WAY = 15
NATIVE = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
PACKAGES = (
    "hipserve",
    "hipserve.ops",
    "hipserve.attention",
    "hipserve.cache",
    "hipserve.plan",
    "hipserve.types",
)


def test_files_stay_short() -> None:
    folders = ("src", "tests", "benchmarks", "docs", "examples", "build_backend")
    files = [*NATIVE, *(f for folder in folders for f in (ROOT / folder).rglob("*.py"))]
    long = {str(f.relative_to(ROOT)): len(f.read_text("utf-8").splitlines()) for f in files}
    assert len(long) > 300
    assert {file for file, length in long.items() if length > LONGEST} == set()


def test_the_pruning_rule_has_one_home() -> None:
    """`plan/rule.py` computes window starts; operations and kernels take them as a column."""
    sources = [*(ROOT / "src").rglob("*.py"), *NATIVE]
    text = {str(f.relative_to(ROOT)): f.read_text("utf-8") for f in sources}
    defined = [f for f in text if re.search(r"\b(def|int|int32_t|int64_t) window_start\(", text[f])]
    assert defined == ["src/hipserve/plan/rule.py"]
    operations = [f for f in text if f.startswith(("csrc/", "src/hipserve/ops/"))]
    assert len(operations) > 20
    for name in ("dense_below", "granularity", "SINGLE_ROW"):
        assert [f for f in operations if name in text[f]] == []


def public() -> Iterator[Any]:
    """`name, documentation, signature` of what takes, returns or holds tensors."""
    seen: set[Any] = set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        names = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
        for thing in (getattr(module, name) for name in names):
            ours = getattr(thing, "__module__", "").startswith("hipserve")
            if not ours or thing in seen:
                continue
            seen.add(thing)
            if inspect.isfunction(thing):
                yield pytest.param(thing, inspect.getdoc(thing), id=thing.__qualname__)
            elif inspect.isclass(thing) and not issubclass(thing, Exception):
                about = inspect.getdoc(thing)
                yield pytest.param(thing.__init__, about, id=f"{thing.__qualname__}()")
                for name, method in vars(thing).items():
                    if inspect.isfunction(method) and name[0] != "_":
                        yield pytest.param(method, inspect.getdoc(method), id=method.__qualname__)


def has_tensor(kind: Any) -> bool:
    parts = typing.get_args(kind)
    return kind is torch.Tensor or any(has_tensor(part) for part in parts)


@pytest.mark.parametrize(("function", "documentation"), list(public()))
def test_public_functions_show_the_shapes_of_their_tensors(
    function: Any, documentation: str | None
) -> None:
    kinds = typing.get_type_hints(function)
    text = " ".join((documentation or "").split())
    returned = kinds.pop("return", None)
    for name in (name for name, kind in kinds.items() if has_tensor(kind) and name[0] != "_"):
        assert re.search(rf"\b{name}\b[^`.]*`\[", text), f"{name} has no shape: {text}"
    if has_tensor(returned):
        assert re.search(r"`\[|\blike\b", text), f"what it returns has no shape: {text}"


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions of a module and methods of its classes, by qualified name; no kernels."""
    for child in getattr(node, "body", []):
        if isinstance(child, ast.FunctionDef) and not is_kernel(child):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}{child.name}.")


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def takes_tensor(function: ast.FunctionDef) -> bool:
    taken = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return any(x.annotation and "Tensor" in ast.unparse(x.annotation) for x in taken)


def is_overload(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "overload" for decorator in function.decorator_list)


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "src" / "hipserve").rglob("*.py")):
        name = path.relative_to(ROOT / "src" / "hipserve").with_suffix("").as_posix()
        yield name, ast.parse(path.read_text("utf-8"))


def test_every_public_function_of_tensors_shows_a_shape_in_its_own_docstring() -> None:
    missing = {
        f"{module}:{name}"
        for module, tree in trees()
        for name, function in functions(tree)
        if takes_tensor(function) and not is_overload(function) and "._" not in f".{name}"
        if "`[" not in (ast.get_docstring(function) or "")
    }
    assert missing == set(), "add `[...]` to their docstrings"


def long_calls(tree: ast.Module) -> Iterator[str]:
    """What is called with more than six positional arguments, inside of kernels and operators
    aside: names cost an operator 2 us a call."""
    kernels = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and is_kernel(x)]
    inside = {id(x) for kernel in kernels for x in ast.walk(kernel)}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and len(call.args) > 6 and id(call) not in inside:
            called = ast.unparse(call.func)
            if not called.startswith("torch.ops."):
                yield called


def test_no_call_has_more_than_six_positional_arguments() -> None:
    found = {f"{module}:{called}" for module, tree in trees() for called in long_calls(tree)}
    assert found == set(), "pass arguments by name, or a record"


def lengths(tree: ast.Module, *, kernels: bool) -> Iterator[tuple[str, int, int]]:
    """Name, lines and parameters of its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and is_kernel(node) == kernels:
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1, len(node.args.args)


def test_functions_stay_short() -> None:
    plain = {f"{m}:{n}": long for m, t in trees() for n, long, _ in lengths(t, kernels=False)}
    kernels = {f"{m}:{n}": x for m, t in trees() for n, *x in lengths(t, kernels=True)}
    assert {name: long for name, long in plain.items() if long > 80} == {}
    assert {name: x for name, x in kernels.items() if x[0] > 150 or x[1] > 25} == {}
    ordered = sorted(plain.values())
    assert ordered[len(ordered) // 2] <= 10
    assert ordered[len(ordered) * 9 // 10] <= 35
    assert len(kernels) > 80


def test_gates_see_what_they_are_for() -> None:
    tree = ast.parse(
        "f(1, 2, 3, 4, 5, 6, 7)\nf(1, 2, 3, 4, 5, 6, g=7)\n"
        "a_kernel[2,](1, 2, 3, 4, 5, 6, 7)\ntorch.ops.x.y(1, 2, 3, 4, 5, 6, 7)\n"
        "@triton.jit\ndef k():\n  g(1, 2, 3, 4, 5, 6, 7)\n"
    )
    assert list(long_calls(tree)) == ["f", "a_kernel[2,]"]
    tree = ast.parse("class A:\n  def b(self, x: list[Tensor]): ...\n  def c(self, x: int): ...")
    assert [name for name, f in functions(tree) if takes_tensor(f)] == ["A.b"]


def test_no_import_climbs_unseen() -> None:
    """import-linter knows neither packages named in strings nor the package above all of them."""
    named = r"""import_module\(\s*["']hipserve|__import__|\b__path__\b"""
    above = r"^\s*(import hipserve$|from hipserve import)"
    sources = (ROOT / "src/hipserve").rglob("*.py")
    found = {f.name for f in sources if re.search(f"{named}|{above}", f.read_text("utf-8"), re.M)}
    assert found == set()


def floors() -> dict[str, int]:
    """The floor of each room, as the import contract orders them: the ground is 0."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    layers = tomllib.loads(text)["tool"]["importlinter"]["contracts"][0]["layers"]
    rows = [row.replace("hipserve.", "").split(" | ") for row in reversed(layers)]
    return {room: floor for floor, row in enumerate(rows) for room in row}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/structure.md"])
def test_pages_name_the_rooms_in_the_order_of_imports(page: str) -> None:
    text = " ".join((ROOT / page).read_text("utf-8").split())
    order = re.search(r"imports go down only[^:]*: (cli [^.:]*)\.", text, re.I)
    assert order is not None
    rooms = floors()
    told = [[rooms[room] for room in row.split(", ")] for row in order[1].split(" → ")]
    assert sum(map(len, told)) >= len(rooms) - 2  # those of 0.1 may be left out
    assert all(low < min(high) for high, row in itertools.pairwise(told) for low in row)


def way_of(q: torch.Tensor, call: typing.Callable[[], object]) -> list[str]:
    """The files of the package that a tensor is handed to, in order, one entry a stay."""
    package, memory = str(ROOT / "src/hipserve"), q.untyped_storage().data_ptr()
    files: list[str] = []

    def is_handed(x: object) -> bool:
        if isinstance(x, torch.Tensor):
            return x.untyped_storage().data_ptr() == memory
        return isinstance(x, tuple | list) and any(is_handed(part) for part in x)

    def watch(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            taken = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(is_handed(frame.f_locals.get(name)) for name in taken):
                files.append(str(Path(code.co_filename).relative_to(package)))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return [file for file, _ in itertools.groupby(files)]


def test_the_way_of_the_queries_is_short() -> None:
    """From `hip_attention` through both operations to their kernels: files, and moves up."""
    q = torch.randn(1, 512, 4, 64)
    k, v = torch.randn(2, 1, 512, 2, 64)
    config = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32, dense_below=0)
    way = way_of(q, lambda: hip_attention(q, k, v, config=config, backend="reference"))
    ground = floors()
    levels = [ground[file.split("/")[0].removesuffix(".py")] for file in way]
    assert way[0] == "attention/hip.py"
    assert way[-1] == "ops/block_sparse_attention/reference.py"
    assert len(way) <= LONGEST_WAY, way
    assert sum(low < high for low, high in itertools.pairwise(levels)) <= 2, way


PROGRAMS = [
    f for folder in ("benchmarks", "examples", "docs") for f in (ROOT / folder).glob("*.py")
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_programs_import_what_exists(program: Path) -> None:
    """Most of them need a card or hours, so no test runs them: what they import has to be there."""
    for node in ast.walk(ast.parse(program.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hipserve"):
            assert node.module is not None
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert missing == [], f"{node.module} has no such names"


def test_commands_stay_short() -> None:
    files = (ROOT / "src/hipserve/cli").glob("*.py")
    assert [f.name for f in files if len(f.read_text("utf-8").splitlines()) >= 300] == []


@pytest.mark.parametrize("old", ["hipserve.evaluate", "hipserve.bench"])
def test_public_names_of_the_last_release_lead_to_their_new_home(old: str) -> None:
    module, lab = importlib.import_module(old), importlib.import_module("hipserve.lab")
    for name in module.__all__:
        with pytest.warns(
            DeprecationWarning, match=rf"{old}\.{name} is hipserve\.lab\.{name} "
        ) as w:
            assert getattr(module, name) is getattr(lab, name)
        assert w[0].filename == __file__
    with pytest.raises(AttributeError, match=rf"'{old}' has no attribute 'x'; see hipserve\.lab"):
        _ = module.x


def test_the_lab_exports_what_it_promises() -> None:
    lab = importlib.import_module("hipserve.lab")
    assert sorted(vars(importlib.import_module("hipserve.evaluate"))["__all__"]) == [
        "Document",
        "PerplexityReport",
        "RetrievalReport",
        "TASKS",
        "evaluate_perplexity",
        "evaluate_retrieval",
        "make_sample",
        "read_documents",
    ]
    assert all(getattr(lab, name) is not None for name in lab.__all__)
