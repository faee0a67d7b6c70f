"""`hipserve lab report`: one page of what the lab measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipserve.cli import comparison, options
from hipserve.cli.files import make_folder, write
from hipserve.cli.lab_shared import Text
from hipserve.cli.output import result, result_json, say
from hipserve.cli.steps import Steps

if TYPE_CHECKING:
    from hipserve.lab.report.report import LabReport

NAME = "hipserve-lab"


def report(
    model: options.Model = None,
    length: comparison.Length = None,
    text: Text = None,
    parts: Annotated[
        str,
        typer.Option(
            help="quality, answers, drift, cache, representative, locality, meter, with commas; "
            "all if empty."
        ),
    ] = "",
    out: Annotated[
        Path,
        typer.Option(
            parser=options.parse_path,
            metavar="FOLDER",
            help="Folder for hipserve-lab.html, hipserve-lab.md and hipserve-lab.log.",
        ),
    ] = Path(),
    seed: options.Seed = 0,
    dense: Annotated[
        str,
        typer.Option(
            metavar="KERNELS",
            help="Kernels of dense attention: sdpa or hip; the faster ones if left out.",
        ),
    ] = "",
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    json: options.Json = False,
) -> None:
    """Quality, answers, drift, caches, representatives, locality, meter: HTML and Markdown.

    Both have the same numbers; --json prints every measurement as well.
    """
    base = options.make_config(config, preset, budget, selector)
    kernels = comparison.parse_dense(dense) if dense else None
    make_folder("--out", out)
    from hipserve.lab.report.report import make_report
    from hipserve.lab.samples import CHARACTERS, domain_documents
    from hipserve.lab.shown import check_drawing
    from hipserve.lab.text import read_documents

    check_drawing()
    loaded = options.load_model(model, base, device, dtype)
    length = comparison.choose_length(loaded, length)
    documents = read_documents(text) if text else domain_documents(CHARACTERS * length, seed)
    with Steps("measuring …", out / f"{NAME}.log") as shown:
        made = make_report(
            loaded,
            base,
            documents,
            length=length,
            parts=[part.strip() for part in parts.split(",") if part.strip()],
            progress=shown.update,
            note=shown.note,
            dense=kernels,
            finished=lambda made: _write(made, out),
        )
    comparison.say_what_is_dense(loaded, {"hip": base}, length)
    for suffix in (".html", ".md"):
        (say if json else result)(f"written: {out / f'{NAME}{suffix}'}")
    if json:
        result_json(made.to_dict())


def _write(made: LabReport, out: Path) -> None:
    """The page so far: after every part, so an interruption loses one part only."""
    page = made.to_page()
    for suffix, content in ((".html", page.to_html()), (".md", page.to_markdown())):
        write("--out", out / f"{NAME}{suffix}", content)
