"""`hipserve`: the commands, and what becomes of their errors."""

from __future__ import annotations

import os
import sys

import typer
from rich.markup import escape

from hipserve.cli import bench, chat, demo, doctor, evaluate, run, serve, version
from hipserve.cli.output import err
from hipserve.errors import ArgumentError, BackendError, FitError, HipserveError

EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 does not fit, 4 no backend."

app = typer.Typer(
    help="HiP attention: long-context language models faster, without training.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(run.run)
app.command()(chat.chat)
app.command()(demo.demo)
app.command(context_settings=serve.PASS_ON)(serve.serve)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="eval")
app.command()(doctor.doctor)
app.command()(version.version)


def main() -> None:
    """Entry point: an error is one sentence and an exit code; HIPSERVE_DEBUG=1 shows where."""
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("HIPSERVE_DEBUG"):
            raise
        err.print(f"[red]error:[/red] {escape(_sentence(error))}", soft_wrap=True, highlight=False)
        sys.exit(exit_code(error))


def exit_code(error: Exception) -> int:
    """2 for bad input, 3 where something does not fit, 4 without a backend, else 1."""
    if isinstance(error, FitError):
        return 3
    if isinstance(error, BackendError):
        return 4
    return 2 if isinstance(error, ArgumentError) else 1


def _sentence(error: Exception) -> str:
    if isinstance(error, HipserveError):
        return str(error)
    reason = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {reason}; HIPSERVE_DEBUG=1 shows where"


if __name__ == "__main__":
    main()
