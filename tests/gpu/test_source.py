"""What a reader of the Triton kernels may rely on; needs neither a GPU nor Triton."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

OPS = Path(__file__).parents[2] / "src/hipserve/ops"
FILES = [file for file in OPS.rglob("*.py") if "@triton.jit" in file.read_text("utf-8")]
LONGEST, MOST_PARAMETERS = 150, 25


def kernels(file: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(file.read_text("utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [node for node in found if "triton.jit" in map(ast.unparse, node.decorator_list)]


def test_there_are_kernels() -> None:
    assert sum(len(kernels(file)) for file in FILES) > 40


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(OPS)))
def test_kernels_are_legible(file: Path) -> None:
    """Each says what it computes, is short, and reads records by names."""
    for kernel in kernels(file):
        assert ast.get_docstring(kernel), f"{kernel.name} has no docstring"
        assert (kernel.end_lineno or 0) - kernel.lineno < LONGEST, kernel.name
        assert len(kernel.args.args) <= MOST_PARAMETERS, kernel.name
        for node in ast.walk(kernel):
            numbered = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
            if numbered and not ast.unparse(node).endswith(".shape[0]"):
                raise AssertionError(f"{kernel.name}: {ast.unparse(node)} has no name")
