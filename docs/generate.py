"""Writes docs/reference.md from the code: `make docs`. A test fails where the two differ."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from hipserve import HiPConfig
from hipserve.cli.main import EXIT_CODES, app
from hipserve.integrations.vllm.metrics import LAYER_METRICS, METRICS
from hipserve.presets import PRESETS

PAGE = Path(__file__).with_name("reference.md")
INTRODUCTION = """# Reference

Made from the code by `make docs`. [speed.md](speed.md) and [quality.md](quality.md) measure what
the options do; [serving.md](serving.md) says more about the server.
"""


CONFIGURATION = """Fields of `HiPConfig`: in Python, in TOML or JSON files for `--config`, in
`model.config.hip`, and under `hip` in vLLM's
`--additional-config`.
"""


def page() -> str:
    parts = [INTRODUCTION, "## Commands\n", *commands(), "## Exit codes\n", exit_codes()]
    parts += ["## Configuration\n", CONFIGURATION, fields(), presets()]
    return "\n".join(
        [*parts, "## Metrics\n", "What `/metrics` of a server adds to vLLM's own.\n", metrics()]
    )


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    cells = [head, tuple("---" for _ in head), *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def code(text: object) -> str:
    return f"`{text}`" if text not in ("", None) else ""


# Commands.


def commands() -> Iterator[str]:
    """A heading, a sentence and a table for every command."""
    for name, command in walk("hipserve", typer.main.get_command(app)):
        words = [argument(p) for p in command.params if p.param_type_name == "argument"]
        yield f"### {' '.join([name, *words])}\n"
        yield " ".join(command.help.split()) + "\n"
        options = [p for p in command.params if p.param_type_name == "option"]
        if options:
            yield table(("option", "default", ""), map(option, options))


def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """The commands of a group, and those of its groups."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for word, inner in command.commands.items():
        if not inner.hidden:
            yield from walk(f"{name} {word}", inner)


def argument(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def option(parameter: Any) -> tuple[str, ...]:
    """What it is called, what it is by default, and what it is for."""
    names = ", ".join(parameter.opts) + (f" {parameter.metavar}" if parameter.metavar else "")
    opposite = f", {code(parameter.secondary_opts[0])}" if parameter.secondary_opts else ""
    shown, value = parameter.show_default, parameter.default
    if not isinstance(shown, str):
        shown = "" if value is None or value is False else value
    about = parameter.help or ""
    if parameter.envvar:
        about = f"{about} Or {code(parameter.envvar)} in the environment.".strip()
    return code(names) + opposite, code(shown), about


def exit_codes() -> str:
    rows = re.findall(r"(\d) ([^,.]+)", EXIT_CODES)
    return table(("code", ""), [(code(number), meaning) for number, meaning in rows])


# Configuration.


def fields() -> str:
    about = attributes(inspect.getdoc(HiPConfig) or "")
    rows: list[tuple[str, ...]] = []
    for field in dataclasses.fields(HiPConfig):
        if field.init:
            default = "none" if field.default is None else json.dumps(field.default)
            rows.append((code(field.name), code(default), about.pop(field.name)))
    assert not about, f"HiPConfig describes what it has not: {', '.join(about)}"
    return table(("field", "default", ""), rows)


def attributes(docstring: str) -> dict[str, str]:
    """The sentences under `Attributes:`, by name."""
    section = docstring.split("Attributes:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.M)
    return {name: " ".join(sentence.split()) for name, sentence in entries}


def presets() -> str:
    rows = [
        (code(name), ", ".join(code(f"{key} = {json.dumps(value)}") for key, value in own.items()))
        for name, own in PRESETS.items()
    ]
    return table(("preset", "what it changes"), rows)


# Metrics.


def metrics() -> str:
    rows: list[tuple[str, ...]] = []
    for name, group in itertools.groupby(METRICS, lambda metric: metric.name):
        same = list(group)
        reasons = [code(metric.reason) for metric in same if metric.reason]
        labels = f"reason: {', '.join(reasons)}" if reasons else ""
        shown, kind = (name, "gauge") if same[0].gauge else (f"{name}_total", "counter")
        rows.append((code(shown), kind, labels, same[0].help))
    rows += [(code(f"{m.name}_total"), "counter", "layer", m.help) for m in LAYER_METRICS]
    return table(("metric", "kind", "labels", ""), rows)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
