"""What values the fields of a configuration may have, and how they are written down."""

from __future__ import annotations

import json
import math
from typing import Any, cast

from hipserve.errors import ConfigError

INT32_MAX = 2**31 - 1


def wrong(name: str, expected: str, got: object, hint: str = "") -> ConfigError:
    """The error for the value of a field."""
    return ConfigError(name, expected, repr(got), hint)


def check_int(name: str, value: object, low: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not low <= cast("int", value) <= INT32_MAX:
        expected = f"a whole number from {low} to {INT32_MAX}"
        raise wrong(name, expected, value)


def check_choice(name: str, value: object, choices: tuple[str, ...], hint: str = "") -> None:
    if value not in choices:
        raise wrong(name, f"one of {', '.join(choices)}", value, hint)


def check_fraction(name: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not 0 <= (cast("float", value) if is_number else math.nan) <= 1:
        raise wrong(name, "a fraction from 0 to 1", value, "use 0.5 for half")


def check_factor(name: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not 1 < (cast("float", value) if is_number else math.nan) <= 1024:
        raise wrong(name, "a number above 1, at most 1024", value)


def check_table(name: str, value: object) -> None:
    if value is None:
        return
    plain = isinstance(value, dict) and all(map(_is_plain, cast("dict[str, Any]", value).values()))
    if not plain:
        raise wrong(name, "a table of texts, numbers and lists of them", value)


def _is_plain(value: object) -> bool:
    items = cast("list[object]", value) if isinstance(value, list) else [value]
    return all(isinstance(item, str | int | float) for item in items)


def layers(value: object) -> tuple[int, ...]:
    """Layer indices, ascending, of a list of them or of the number of the first ones."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return tuple(range(value))
    if isinstance(value, list | tuple):
        numbers = cast("tuple[object, ...]", tuple(value))
        if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in numbers):
            return tuple(sorted(set(cast("tuple[int, ...]", numbers))))
    raise wrong(
        "dense_layers", "a number of layers or a list of layer indices", value, "use [0, 1]"
    )


def factors(value: object) -> tuple[tuple[float, ...], ...]:
    """Factors of a budget, one list a layer."""
    if isinstance(value, list | tuple):
        lists = cast("list[object]", value)
        if all(isinstance(one, list | tuple) and all(map(_is_factor, one)) for one in lists):
            return tuple(tuple(float(x) for x in one) for one in cast("list[list[float]]", value))
    expected = "one list a layer of factors above 0, at most 1024"
    raise wrong("budget_factors", expected, value, "use [[0.5, 1.5]] for two heads of every layer")


def _is_factor(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return 0 < (cast("float", value) if is_number else math.nan) <= 1024


def toml(values: dict[str, Any]) -> str:
    """Keys and plain values; None has no form in TOML and is left out."""
    pairs = [(key, value) for key, value in values.items() if value is not None]
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in pairs)
