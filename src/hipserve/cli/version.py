"""`hipserve version`."""

from __future__ import annotations

from importlib.metadata import version as version_of

import typer

from hipserve.cli import options
from hipserve.cli.output import result, result_json

PACKAGES = ("hipserve", "torch", "transformers")


def version(json: options.Json = False) -> None:
    """Prints the versions of hipserve, torch and transformers."""
    versions = {name: version_of(name) for name in PACKAGES}
    if json:
        result_json(versions)
    else:
        result("\n".join(f"{name} {number}" for name, number in versions.items()))


def show_own(wanted: bool) -> None:
    """`hipserve --version`: without looking up torch's."""
    if wanted:
        result(f"hipserve {version_of('hipserve')}")
        raise typer.Exit
