"""`hipserve eval`: the commands that measure quality, together."""

from __future__ import annotations

from hipserve.cli import eval_perplexity, eval_retrieval
from hipserve.cli.commands import Commands

app = Commands(help="Quality of pruned attention compared with dense attention.")
app.command()(eval_retrieval.retrieval)
app.command()(eval_perplexity.perplexity)
