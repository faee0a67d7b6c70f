"""`hipserve bench serve`: a server with HiP attention compared with vLLM's dense attention."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.files import make_room, write
from hipserve.cli.numbers import at_least, parse_counts
from hipserve.cli.output import err, result_json, show
from hipserve.models.bundled import BUNDLED, bundled_path

if TYPE_CHECKING:
    from hipserve.lab.speed.serve import Row


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Directory or hub name; the bundled model if left out."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths.")] = "512,8k,32k",
    repeats: Annotated[
        int,
        typer.Option(
            parser=at_least(1),
            metavar="N",
            help="Answers for each length and server; one beyond 32k.",
        ),
    ] = 3,
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    csv: Annotated[
        Path | None,
        typer.Option(parser=options.parse_path, metavar="FILE", help="CSV file for the rows."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Time to first token and between tokens, compared with vLLM's own dense attention."""
    from hipserve.lab.speed.serve import as_csv, compare
    from hipserve.serving.address import free_port
    from hipserve.serving.child import interrupt_on_signals
    from hipserve.serving.command_line import quick_start

    settings = options.make_config(config, preset, budget, selector)
    make_room("--csv", csv)
    name = model or BUNDLED
    path = str(bundled_path()) if name == BUNDLED else name
    wanted = parse_counts(lengths)
    memory = ["--kv-cache-memory-bytes", str(3 << 29)]
    flags = [*memory, *(quick_start(()) if name == BUNDLED else ())]
    ports = (free_port(), free_port())

    def tell(row: Row) -> None:
        err.print(f"{row.prompt_tokens:,} tokens: first {row.first_ratio:.1f}x, ", end="")
        err.print(f"decode {row.decode_ratio:.2f}x", highlight=False)

    interrupt_on_signals()
    with tempfile.TemporaryDirectory() as folder:
        err.print("starting two servers; then they answer alternately", highlight=False)
        rows, together = compare(
            path, wanted, settings, Path(folder), ports, flags=flags, repeats=repeats, on_row=tell
        )
    if csv:
        write("--csv", csv, as_csv(rows, together, f"hipserve {' '.join(sys.argv[1:])}"))
    if json:
        result_json({"rows": [asdict(row) for row in rows], "together": asdict(together)})
        return
    show(table(rows))
    speeds = f"{together.dense_tokens_per_second:.0f} -> {together.hip_tokens_per_second:.0f}"
    clients = f"{together.clients} clients x {together.prompt_tokens:,} tokens"
    show(f"{clients}: dense -> HiP {speeds} tokens/s ({together.ratio:.2f}x)")


def table(rows: list[Row]) -> Table:
    """Rows as a table."""
    columns = ("prompt", "first token: dense", "HiP", "", "between tokens: dense", "HiP", "")
    shown = Table(*columns)
    for row in rows:
        cells = (
            f"{row.prompt_tokens:,}",
            f"{row.dense_first_seconds:.2f} s",
            f"{row.hip_first_seconds:.2f} s",
            f"{row.first_ratio:.1f}x",
            f"{row.dense_decode_ms:.1f} ms",
            f"{row.hip_decode_ms:.1f} ms",
            f"{row.decode_ratio:.2f}x",
        )
        shown.add_row(*cells)
    return shown
