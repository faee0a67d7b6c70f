"""What the commands of the lab that look into heads share: texts, tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.files import make_room, write
from hipserve.cli.numbers import at_least, parse_count
from hipserve.cli.output import result_json, say, show

if TYPE_CHECKING:
    from hipserve.lab.samples import Sample
    from hipserve.lab.shown import Chart, Grid
    from hipserve.lab.text import Document
    from hipserve.models import LoadedModel

Length = Annotated[
    int,
    typer.Option(parser=parse_count, metavar="TOKENS", help="Tokens of each text."),
]
Samples = Annotated[
    int,
    typer.Option(
        parser=at_least(1), metavar="N", help="Stretches of each text, or of each domain."
    ),
]


def text_option(otherwise: str) -> Any:
    """Texts to read; `otherwise` says which ones are read if it is left out."""
    texts = "Text or .jsonl file, or @licenses or @sources"
    shown = f"{texts}; if left out, {otherwise}. Repeatable."
    return typer.Option(parser=options.parse_path, metavar="FILE", help=shown)


Text = Annotated[
    list[Path] | None,
    text_option("code, documentation, licences, tables and identifiers that every machine has"),
]
Svg = Annotated[
    Path | None,
    typer.Option(parser=options.parse_path, metavar="FILE", help="Picture to write, as SVG."),
]


def check_svg(svg: Path | None) -> None:
    """Before anything is measured: a picture can be drawn, and its file has a folder."""
    if svg is None:
        return
    from hipserve.lab.shown import check_drawing

    check_drawing()
    make_room("--svg", svg)


def read_samples(
    loaded: LoadedModel,
    text: list[Path] | None,
    length: int,
    samples: int,
    seed: int,
    domains: Callable[[int, int], list[Document]] | None = None,
) -> list[Sample]:
    """Stretches of the texts, or of those that `domains` makes; of `domain_documents` if None."""
    from hipserve.lab.samples import CHARACTERS, cut_samples, domain_documents
    from hipserve.lab.text import read_documents

    size = CHARACTERS * length * samples
    documents = read_documents(text) if text else (domains or domain_documents)(size, seed)
    found = cut_samples(loaded, documents, length, samples)
    for doc in documents:
        if not any(sample.name.startswith(doc.name) for sample in found):
            say(f"left out, shorter than {length:,} tokens: {doc.name}", style="yellow")
    return found


def show_report(
    table: dict[str, Any],
    grids: Sequence[Grid],
    charts: Sequence[Chart],
    *,
    svg: Path | None,
    json: bool,
) -> None:
    """The picture in its file, then on stdout the report as a JSON table or as tables."""
    write_svg(svg, charts)
    if json:
        result_json(table)
    else:
        show_grids(grids)


def show_grids(grids: Sequence[Grid]) -> None:
    """Tables on stdout."""
    for grid in grids:
        table = Table(title=grid.title, caption=grid.caption or None)
        for heading in grid.headings:
            table.add_column(heading)
        for row in grid.rows:
            table.add_row(*row)
        show(table)


def write_svg(svg: Path | None, charts: Sequence[Chart]) -> None:
    """Charts side by side in one file."""
    if svg is None:
        return
    from hipserve.lab.shown import draw_svg

    write("--svg", svg, draw_svg(charts))
    say(f"written: {svg}")
