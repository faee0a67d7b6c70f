"""The package as strangers get it: one wheel, no compiler, types, torch's stable interface."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from hipserve.platform import native_library

ROOT = Path(__file__).parent.parent
TYPED = Path(__file__).with_name("typed_user.py")
ANSWERS = """
import torch
from hipserve import HiPConfig, hip_attention
from hipserve.platform import native_library

assert native_library().tier, native_library().reason
q, k = torch.randn(1, 300, 4, 64), torch.randn(1, 300, 2, 64)
config = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32, dense_below=0)
native, exact = (hip_attention(q, k, k, config=config, backend=b) for b in ("cpu", "reference"))
torch.testing.assert_close(native, exact)
print(torch.__file__, native_library().tier)
"""

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def run(*command: str | Path, path: str) -> str:
    """The output of a command that must succeed and finds programs only in `path`."""
    environment = {"PATH": path, "HF_HUB_OFFLINE": "1", "HOME": "/nonexistent"}
    done = subprocess.run(
        [str(word) for word in command], env=environment, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` builds."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the requirements, where plain pip installed the wheel.

    Neither a compiler nor an index is in reach: a requirement that is missing fails.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, path="")
    (site,) = folder.glob("lib/python*/site-packages")
    for entry in (e for p in sys.path if p.endswith("site-packages") for e in Path(p).iterdir()):
        link = site / entry.name
        if not (link.exists() or "hipserve" in entry.name or entry.suffix == ".pth"):
            link.symlink_to(entry)
    programs = folder / "bin"
    run(programs / "python", "-m", "pip", "install", "--no-index", wheel, path=str(programs))
    return programs


@needs_compiler
def test_a_wheel_serves_every_python_of_a_platform(wheel: Path) -> None:
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert re.fullmatch(rf"hipserve-[^-]+-py3-none-{tag}\.whl", wheel.name)


@needs_compiler
def test_the_installed_wheel_computes_and_answers_without_a_compiler(
    programs: Path, tmp_path: Path
) -> None:
    where, tier = run(programs / "python", "-c", ANSWERS, path=str(programs)).split()
    assert Path(where).is_relative_to(programs.parent)
    assert tier == native_library().tier
    document = tmp_path / "document.txt"
    document.write_text("The pass key is 83724. Remember it. 83724 is the pass key.")
    question = ("--doc", document, "What is the pass key?")
    assert "83724" in run(programs / "hipserve", "run", *question, path=str(programs))


@needs_compiler
def test_the_library_refers_to_nothing_outside_torchs_stable_interface(programs: Path) -> None:
    """Symbols of the C library and compiler runtimes carry a version; those left are torch's."""
    (library,) = programs.parent.glob("lib/python*/site-packages/hipserve/_cpu.so")
    command = ["nm", "--dynamic", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = {line.split()[1] for line in lines if line.split()[0] == "U"}
    torch_symbols = {symbol for symbol in symbols if "@" not in symbol}
    assert "torch_library_impl" in torch_symbols
    strange = {s for s in torch_symbols if not s.startswith(("aoti_torch_", "torch_library_"))}
    assert not strange


def test_an_isolated_build_takes_the_headers_of_the_torch_it_will_run_with(programs: Path) -> None:
    """pip hides the environment's packages from such a build, and knows where they are."""
    script = str(ROOT / "build_backend" / "torch_headers.py")
    hidden = "import runpy, sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; "
    found = run(
        programs / "python",
        "-c",
        f"{hidden}runpy.run_path({script!r}, run_name='__main__')",
        path="",
    )
    (torch,) = programs.parent.glob("lib/python*/site-packages/torch")
    assert Path(found) == torch


@pytest.mark.parametrize(
    ("installed", "settings", "wanted"),
    [
        (None, None, ["torch>=2.10"]),
        (None, {"cmake.define.HIPSERVE_NATIVE": "OFF"}, []),
        ("/env/torch", None, []),
    ],
)
def test_a_build_asks_for_torch_only_where_none_is_installed(
    monkeypatch: pytest.MonkeyPatch,
    installed: str | None,
    settings: dict[str, str] | None,
    wanted: list[str],
) -> None:
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    backend = importlib.import_module("backend")
    monkeypatch.setattr(backend, "find", lambda: installed)
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert [need for need in hook(settings) if need.startswith("torch")] == wanted


def test_a_strictly_typed_program_checks_against_the_installed_package(
    programs: Path, tmp_path: Path
) -> None:
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    shutil.copy(TYPED, tmp_path / "program.py")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", str(tmp_path)]
    command += ["--pythonpath", str(programs / "python")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    assert [error["message"] for error in found["generalDiagnostics"]] == []
