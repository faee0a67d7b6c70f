"""`hipserve bench`: speed beside dense attention."""

from __future__ import annotations

import typer

from hipserve.cli import bench_serve

app = typer.Typer(help="Speed of HiP attention beside dense attention.", no_args_is_help=True)


@app.callback()
def _bench() -> None: ...


app.command()(bench_serve.serve)
