"""What a result looks like, whatever shows it: tables of words, and charts of numbers.

A terminal, Markdown and HTML show the same `Grid`; matplotlib draws a `Chart`.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from hipserve.errors import HipserveError
from hipserve.lab.intervals import Estimate, Interval


@dataclass(frozen=True, slots=True)
class Grid:
    """A table; every cell is text.

    Attributes:
        title: above it.
        headings: of its columns.
        rows: as many cells each.
        caption: below it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def to_markdown(self) -> str:
        cells = [self.headings, ["---"] * len(self.headings), *self.rows]
        lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in cells]
        table = "\n".join(f"| {line} |" for line in lines)
        return f"**{self.title}**\n\n{table}\n" + (f"\n{self.caption}\n" if self.caption else "")

    def to_html(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.headings)
        rows = [
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        ]
        body = "\n".join([f"<tr>{head}</tr>", *rows])
        below = f"<p>{escape(self.caption)}</p>" if self.caption else ""
        return f"<h3>{escape(self.title)}</h3>\n<table>\n{body}\n</table>\n{below}"


@dataclass(frozen=True, slots=True)
class Line:
    """Points of a chart that belong together.

    Attributes:
        label: in the legend.
        x, y: of each point; words stand side by side.
        style: joined, or each point by itself.
    """

    label: str
    x: Sequence[float | str]
    y: Sequence[float]
    style: Literal["line", "dots"] = "line"


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one axis; `log_x` and `log_y` say which axes are logarithmic."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False

    def to_svg(self) -> str:
        """The chart as an SVG element, drawn by matplotlib.

        Raises:
            HipserveError: matplotlib is not installed.
        """
        return draw_svg([self])


def counted(number: int, noun: str) -> str:
    """`1 document`, `1,024 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_drawing() -> None:
    """Raises HipserveError where nothing can be drawn: asked before a measurement."""
    _matplotlib("matplotlib")


def draw_svg(charts: Sequence[Chart]) -> str:
    """Charts side by side in one SVG element, for a file or for the inside of a page.

    Raises:
        HipserveError: matplotlib is not installed.
    """
    _matplotlib("matplotlib.backends.backend_svg")
    # Names inside of the picture are its own, and the same every time.
    fixed = {"svg.hashsalt": charts[0].title, "svg.fonttype": "none"}
    options = {"figsize": (4.6 * len(charts), 3.4), "layout": "constrained"}
    with _matplotlib("matplotlib").rc_context(fixed):
        figure = _matplotlib("matplotlib.figure").Figure(**options)
        for axes, chart in zip(
            figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True
        ):
            _draw(axes, chart)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def _draw(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        form = {"marker": "o", "markersize": 3} if line.style == "line" else {"s": 14}
        draw = axes.plot if line.style == "line" else axes.scatter
        draw(line.x, line.y, label=line.label, **form)
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    if chart.log_x:
        axes.set_xscale("log", base=2)
    if chart.log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(chart.lines) > 1:
        axes.legend(fontsize=7)


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise HipserveError(
            "pictures are drawn by matplotlib, which is not installed",
            "pip install 'hipserve[lab]'",
        ) from None


def with_error(measured: Estimate, form: str = ".3f") -> str:
    """A mean and, where there are enough units, half of its 95 % interval."""
    return with_interval(measured.value, measured.interval(), form)


def with_interval(value: float, interval: Interval | None, form: str = ".3f") -> str:
    """The same for an interval that is known."""
    if interval is None:
        return f"{value:{form}}"
    return f"{value:{form}} ±{(interval[1] - interval[0]) / 2:{form.lstrip('+')}}"
