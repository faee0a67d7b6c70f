"""Rules of the house that no linter knows: lengths of files, shapes in documentation."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
LONGEST = 400
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
    files = [*(ROOT / "src").rglob("*.py"), *NATIVE]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text("utf-8").splitlines()) for f in files}
    assert len(lengths) > 80
    assert {file for file, length in lengths.items() if length > LONGEST} == set()


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
