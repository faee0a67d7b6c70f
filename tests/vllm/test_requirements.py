"""The extra `serve` holds what the installed vLLM asks for: it goes in with --no-deps."""

from __future__ import annotations

import importlib.metadata as installed
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless"}
"""torch is chosen by hand; the others are found as builds for CUDA, or are for images alone."""
NOT_AT_RUN_TIME = {"setuptools", "intel-openmp"}
WITH_VLLM = {"xgrammar"}
"""Goes in with --no-deps too, for the sake of Triton."""


def wheel() -> str:
    """The distribution that holds vLLM here."""
    return installed.packages_distributions()["vllm"][0]


def asked_for(requirements: list[str]) -> list[Requirement]:
    """Those that hold on this machine, without extras."""
    found = map(Requirement, requirements)
    return [x for x in found if x.marker is None or x.marker.evaluate({"extra": ""})]


def installed_with(requirements: list[Requirement]) -> set[str]:
    """Names of requirements and of all that they ask for in turn."""
    names: set[str] = set()
    while requirements:
        name = canonicalize_name(requirements.pop().name)
        if name not in names:
            names.add(name)
            requirements += asked_for(installed.requires(name) or [])
    return names


def test_the_extra_lacks_nothing_that_vllm_asks_for() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    ours = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    wanted = {canonicalize_name(x.name): x for x in asked_for(installed.requires(wheel()) or [])}
    without = LEFT_OUT | NOT_AT_RUN_TIME | WITH_VLLM
    missing = wanted.keys() - installed_with(asked_for(ours)) - without
    assert not missing, f"pyproject.toml, extra serve: add {sorted(missing)}"
    assert len(wanted) > 40


def test_what_is_installed_is_what_vllm_asks_for() -> None:
    """constraints.txt pins versions that it takes."""
    pins = (PROJECT.parent / "constraints.txt").read_text().split()
    pinned = {canonicalize_name(x.name): x for x in map(Requirement, pins)}
    wrong = [
        f"{pinned[name]} is not {requirement}"
        for requirement in asked_for(installed.requires(wheel()) or [])
        if (name := canonicalize_name(requirement.name)) in pinned and name not in LEFT_OUT
        for pin in pinned[name].specifier
        if not requirement.specifier.contains(pin.version, prereleases=True)
    ]
    assert not wrong
