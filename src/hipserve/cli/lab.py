"""`hipserve lab`: the commands that say what is lost, and whether it matters, together."""

from __future__ import annotations

from hipserve.cli import lab_cache, lab_locality, lab_quality, lab_report, lab_representative
from hipserve.cli.commands import Commands
from hipserve.cli.lab_budgets import budgets
from hipserve.cli.lab_depth import depth
from hipserve.cli.lab_drift import drift
from hipserve.cli.lab_meter import meter
from hipserve.cli.lab_speed import speed

app = Commands(help="What pruned attention loses, with intervals, controls and verdicts.")


@app.callback()
def _lab() -> None: ...


app.command()(lab_quality.quality)
app.command()(depth)
app.command()(drift)
app.command()(lab_cache.cache)
app.command()(lab_representative.representative)
app.command()(lab_locality.locality)
app.command()(meter)
app.command()(budgets)
app.command()(speed)
app.command()(lab_report.report)
