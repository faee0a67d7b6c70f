"""`hipserve`: the commands, and how their errors are shown."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from hipserve.cli import (
    bench,
    calibrate,
    chat,
    demo,
    doctor,
    evaluate,
    lab,
    plan,
    run,
    serve,
    version,
)
from hipserve.cli.commands import Commands
from hipserve.cli.output import err, tolerate_any_text
from hipserve.errors import ArgumentError, BackendError, FitError, HipserveError

EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 does not fit, 4 no backend, "
    "5 not certified (calibrate)."
)

app = Commands(
    help="HiP attention: long-context language models faster, without training.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(run.run)
app.command()(chat.chat)
app.command()(demo.demo)
app.command(context_settings=serve.PASS_ON, options_metavar=serve.USAGE)(serve.serve)
app.command()(plan.plan)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="eval")
app.add_typer(lab.app, name="lab")
app.command()(calibrate.calibrate)
app.command()(doctor.doctor)
app.command()(version.version)


@app.callback()
def _hipserve(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=version.show_own, is_eager=True, help="Version of hipserve."
        ),
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point: an error is a sentence and an exit code; HIPSERVE_DEBUG=1 shows where."""
    tolerate_any_text()
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("HIPSERVE_DEBUG"):
            raise
        _complain("error", "red", _sentence(error))
        if hint := getattr(error, "hint", ""):
            _complain("hint", "cyan", hint)
        sys.exit(exit_code(error))


def exit_code(error: Exception) -> int:
    """2 for bad input, 3 where something does not fit, 4 without a backend, else 1."""
    if isinstance(error, FitError):
        return 3
    if isinstance(error, BackendError):
        return 4
    return 2 if isinstance(error, ArgumentError) else 1


def _complain(kind: str, color: str, text: str) -> None:
    err.print(f"[{color}]{kind}:[/{color}] {escape(text)}", soft_wrap=True, highlight=False)


def _sentence(error: Exception) -> str:
    if isinstance(error, HipserveError):
        return error.message
    reason = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {reason}; HIPSERVE_DEBUG=1 shows where"
