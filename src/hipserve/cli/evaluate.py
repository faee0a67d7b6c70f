"""`hipserve eval`: the commands that measure quality, together."""

from __future__ import annotations

from hipserve.cli import eval_perplexity, eval_retrieval
from hipserve.cli.commands import Commands
from hipserve.errors import HipserveError

app = Commands(help="Quality of pruned attention compared with dense attention.")
app.command()(eval_retrieval.retrieval)
app.command()(eval_perplexity.perplexity)


@app.command(
    "cache",
    hidden=True,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def _cache() -> None:
    """Says where to find it."""
    raise HipserveError("hits of a cache are measured by `hipserve lab cache`")
