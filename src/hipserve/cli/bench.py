"""`hipserve bench`: the commands that measure speed, together."""

from __future__ import annotations

from hipserve.cli import bench_attention, bench_serve
from hipserve.cli.commands import Commands

app = Commands(help="Speed of HiP attention compared with dense attention.")


@app.callback()
def _bench() -> None: ...


app.command()(bench_serve.serve)
app.command()(bench_attention.attention)
