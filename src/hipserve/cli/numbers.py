"""Numbers with suffixes: 32k is 32 x 1024, 1M is 1024 x 1024."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

import typer

from hipserve.errors import ConfigError
from hipserve.lab.shown import counted as counted
from hipserve.offload import parse_bytes

FACTORS = {"": 1, "k": 1024, "m": 1024**2}
COLDEST = 0.01
"""Minimum temperature: below it, logits over the temperature overflow. vLLM has the same limit."""

SMALLEST = 1 << 20
"""Minimum bytes of a memory: fewer are a number without its unit."""


def parse_count(text: str | int) -> int:
    """`4096`, `4_096`, `32k`, `1.5k` or `1M` as an int.

    Raises:
        typer.BadParameter: it has another form, or is not a whole number.
    """
    match = re.fullmatch(r"([0-9][0-9_]{,30}(?:\.[0-9]{1,30})?)([kKmM]?)", str(text).strip())
    if match:
        value = Fraction(match[1].replace("_", "")) * FACTORS[match[2].lower()]
        if value.denominator == 1:
            return value.numerator
    if re.fullmatch(r"-[0-9][0-9_.]*[kKmM]?", str(text).strip()):
        raise typer.BadParameter(f"{text} is negative; write a number such as 4096, 32k or 1M")
    raise typer.BadParameter(f"{text!r} is no number; write it as 4096, 32k or 1M")


def parse_size(text: str | int) -> int:
    """`24G`, `24GB` (10^9 each), `22.5GiB` (2^30) or bytes.

    Raises:
        typer.BadParameter: it has another form, is 0, or is so few bytes that a unit is missing.
    """
    try:
        size = parse_bytes("size", text)
    except ConfigError:
        message = f"{text!r} is no size; write it as 24G, 22.5GiB or in bytes"
        raise typer.BadParameter(message) from None
    if size < SMALLEST:
        number = re.sub(r"[^0-9.]", "", str(text))
        raise typer.BadParameter(f"{text} is less than 1 MiB; did you mean {number}G?")
    return size


def at_least(low: int) -> Callable[[str | int], int]:
    """`parse_count` for an option with a minimum."""

    def parse(text: str | int) -> int:
        value = parse_count(text)
        if value < low:
            raise typer.BadParameter(f"{text} is less than {low}")
        return value

    return parse


def parse_temperature(text: str | float) -> float:
    """0, or a finite number whose quotients with logits are finite.

    Raises:
        typer.BadParameter: it is neither.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value == 0 or COLDEST <= value < math.inf:
        return value
    raise typer.BadParameter(f"{text} is neither 0 (greedy) nor a finite number from {COLDEST} on")


def parse_share(text: str | float) -> float:
    """`0.5%` or `0.005`, from 0% to 100%.

    Raises:
        typer.BadParameter: it is neither.
    """
    words = str(text).strip()
    try:
        value = float(words.removesuffix("%")) / (100 if words.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if 0 <= value <= 1:
        return value
    if math.isnan(value):
        raise typer.BadParameter(f"{text!r} is no share; write it as 0.5% or 0.005")
    percent = not words.endswith("%") and 1 < value <= 100
    hint = f"; did you mean {words}%?" if percent else ""
    raise typer.BadParameter(f"{text} is not between 0% and 100%{hint}")


def parse_counts(text: str) -> list[int]:
    """A list with commas: `8k,16k,32k`."""
    return [parse_count(part) for part in text.split(",")]


def format_count(value: int) -> str:
    """The shortest of these forms that is exact."""
    for suffix, factor in (("M", 1024**2), ("k", 1024)):
        if value >= factor and value % factor == 0:
            return f"{value // factor}{suffix}"
    return str(value)


def format_bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def format_seconds(value: float) -> str:
    """Three digits, in the unit that fits: 12.3 s, 4.56 ms, 789 µs."""
    factor, unit = 1e6, "µs"
    if value >= 1e-3:
        factor, unit = (1.0, "s") if value >= 1 else (1e3, "ms")
    return f"{three_digits(value * factor)} {unit}"


def format_ratio(value: float) -> str:
    """148x, 38.5x, 9.80x"""
    return f"{three_digits(value)}x"


def three_digits(value: float) -> str:
    return f"{value:.{max(3 - len(str(int(value))), 0)}f}"
