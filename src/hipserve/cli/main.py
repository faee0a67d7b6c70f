"""`hipserve`: the commands, and what becomes of their errors."""

from __future__ import annotations

import os
import sys

import typer

from hipserve.cli import bench, chat, demo, doctor, evaluate, run, version
from hipserve.cli.output import err
from hipserve.errors import BackendError, FitError, HipserveError, NumericsError

EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 does not fit, 4 no backend."

app = typer.Typer(
    help="HiP attention: long-context language models faster and in less memory, untrained.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(run.run)
app.command()(chat.chat)
app.command()(demo.demo)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="eval")
app.command()(doctor.doctor)
app.command()(version.version)


def main() -> None:
    """Entry point: an error of ours is one sentence and an exit code, never a traceback."""
    try:
        app()
    except HipserveError as error:
        if os.environ.get("HIPSERVE_DEBUG"):
            raise
        err.print(f"[red]error:[/red] {_plain(error)}", soft_wrap=True, highlight=False)
        sys.exit(exit_code(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def exit_code(error: HipserveError) -> int:
    """1 for wrong results, 3 where something does not fit, 4 without backend, 2 for bad input."""
    if isinstance(error, NumericsError):
        return 1
    if isinstance(error, FitError):
        return 3
    return 4 if isinstance(error, BackendError) else 2


def _plain(error: HipserveError) -> str:
    return str(error).replace("[", r"\[")


if __name__ == "__main__":
    main()
