"""A page of tables and charts, as Markdown and as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hipserve.lab.shown import Chart, Grid, draw_svg

STYLE = """body { font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border: 1px solid #ccc; padding: 2px 8px; text-align: left; }
svg { max-width: 100%; height: auto; }
code { background: #f3f3f3; padding: 0 3px; }"""


@dataclass(frozen=True, slots=True)
class Section:
    """What one command measured.

    Attributes:
        title: of the section.
        command: that prints the same numbers.
        findings: sentences, such as verdicts and warnings.
        grids, charts: of one result object.
    """

    title: str
    command: str
    findings: Sequence[str]
    grids: Sequence[Grid]
    charts: Sequence[Chart]

    def to_markdown(self) -> str:
        findings = "".join(f"- {sentence}\n" for sentence in self.findings)
        tables = "\n".join(grid.to_markdown() for grid in self.grids)
        return f"## {self.title}\n\n`{self.command}`\n\n{findings}\n{tables}"

    def to_html(self) -> str:
        findings = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.findings)
        return "\n".join(
            [
                f"<h2>{escape(self.title)}</h2>\n<p><code>{escape(self.command)}</code></p>",
                f"<ul>{findings}</ul>" if findings else "",
                draw_svg(self.charts) if self.charts else "",
                *(grid.to_html() for grid in self.grids),
            ]
        )


@dataclass(frozen=True, slots=True)
class Page:
    """A report.

    Attributes:
        title: of the page.
        facts: where the numbers come from, by name.
        sections: of the page, in order.
    """

    title: str
    facts: dict[str, str]
    sections: Sequence[Section]

    def to_markdown(self) -> str:
        facts = "".join(f"- {name}: {value}\n" for name, value in self.facts.items())
        return "\n".join([f"# {self.title}\n", facts, *(s.to_markdown() for s in self.sections)])

    def to_html(self) -> str:
        """The page with its charts inside.

        Raises:
            HipserveError: matplotlib is not installed.
        """
        facts = "".join(
            f"<li>{escape(name)}: {escape(value)}</li>" for name, value in self.facts.items()
        )
        head = f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{STYLE}</style>'
        body = "\n".join(section.to_html() for section in self.sections)
        return (
            f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
            f"<h1>{escape(self.title)}</h1>\n<ul>{facts}</ul>\n{body}\n</body></html>\n"
        )
