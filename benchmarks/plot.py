"""Draws the speed of attention as a small SVG, from a CSV of either benchmark.

python benchmarks/plot.py docs/data/attention-cpu.csv docs/speed.svg
python benchmarks/plot.py docs/data/attention-gpu.csv docs/speed-gpu.svg
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from xml.sax.saxutils import escape

NAMES = {"sdpa": "torch SDPA", "dense": "our dense kernel", "hip": "HiP"}
COLORS = {"sdpa": "#8a8a8a", "dense": "#4477aa", "hip": "#cc3311"}
TITLES = {"prefill": "Prefill of one layer", "decode": "One decode step of one layer"}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 860, 360, 64, 64, 56, 420
INNER_WIDTH, INNER_HEIGHT = 240, HEIGHT - TOP - BOTTOM

Series = dict[str, list[tuple[int, float]]]


def read(path: Path) -> tuple[str, dict[str, Series]]:
    """Where the numbers come from, and for each phase the (length, seconds) of each contender."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ")]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if "what" in rows[0]:
        return f"{comments[0]}; default configuration, batch 1", read_gpu(rows)
    header = {key: value for key, _, value in (comment.partition(": ") for comment in comments)}
    caption = (
        f"{header['cpu']}, {header['isa']}, {header['threads']} thread(s), {header['clock']} "
        f"clock; {header['heads']} heads of {header['head_dim']}, {header['dtype']}, "
        f"budget {header['config.budget']}; every decode step selects"
    )
    phases: dict[str, Series] = {}
    for row in rows:
        series = phases.setdefault(row["phase"], {})
        series.setdefault(row["contender"], []).append((int(row["length"]), float(row["seconds"])))
    return caption, phases


def read_gpu(rows: list[dict[str, str]]) -> dict[str, Series]:
    """The same from `benchmarks/gpu.py speed`: batch 1, every decode step selecting.

    Graphs for longer sequences than the one in them are left out.
    """
    phases: dict[str, Series] = {}
    alone = [
        row for row in rows if row["batch"] == "1" and row.get("room") in (None, "", row["length"])
    ]
    for row in sorted(alone, key=lambda row: int(row["length"])):
        prefill = row["what"] == "prefill"
        names = ("dense_ms", "hip_ms") if prefill else ("dense_us", "refresh1_us")
        for contender, name in zip(("sdpa", "hip"), names, strict=True):
            seconds = float(row[name]) * (1e-3 if prefill else 1e-6)
            series = phases.setdefault(row["what"], {})
            series.setdefault(contender, []).append((int(row["length"]), seconds))
    return phases


def label_length(length: int) -> str:
    if length % 2**20 == 0:
        return f"{length // 2**20}M"
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def label_seconds(power: int) -> str:
    unit, shift = ("s", 0) if power >= 0 else ("ms", 3) if power >= -3 else ("µs", 6)
    return f"{10 ** (power + shift)} {unit}"


class Panel:
    """Axes with logarithmic scales, `left` pixels from the edge."""

    def __init__(self, left: float, title: str, series: Series) -> None:
        self.left, self.title, self.series = left, title, series
        points = [point for line in series.values() for point in line]
        self.lengths = sorted({length for length, _ in points})
        self.low = math.floor(math.log10(min(seconds for _, seconds in points)))
        self.high = math.ceil(math.log10(max(seconds for _, seconds in points)))

    def x(self, length: int) -> float:
        first, last = math.log2(self.lengths[0]), math.log2(self.lengths[-1])
        return self.left + INNER_WIDTH * (math.log2(length) - first) / max(last - first, 1e-9)

    def y(self, seconds: float) -> float:
        share = (math.log10(seconds) - self.low) / max(self.high - self.low, 1)
        return TOP + INNER_HEIGHT * (1 - share)

    def draw(self) -> list[str]:
        out = [text(self.left, TOP - 16, self.title, size=14, weight="bold")]
        for power in range(self.low, self.high + 1):
            y = self.y(10.0**power)
            out.append(line(self.left, y, self.left + INNER_WIDTH, y, "#dddddd"))
            out.append(text(self.left - 6, y + 4, label_seconds(power), anchor="end"))
        for length in self.lengths:
            label = label_length(length)
            out.append(text(self.x(length), HEIGHT - BOTTOM + 18, label, anchor="middle"))
        for name, label in NAMES.items():
            if name in self.series:
                out += self.draw_line(name, label)
        return out

    def draw_line(self, name: str, label: str) -> list[str]:
        color, points = COLORS[name], sorted(self.series[name])
        places = [(self.x(length), self.y(seconds)) for length, seconds in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>']
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        x, y = places[-1]
        ratio = self.series["sdpa"][-1][1] / points[-1][1]
        times = "" if name == "sdpa" else f" {ratio:.3g}x"
        return [*out, text(x + 8, y + 4, label + times, color=color)]


def line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}"/>'


def text(
    x: float,
    y: float,
    content: str,
    *,
    size: int = 11,
    anchor: str = "start",
    color: str = "#333333",
    weight: str = "normal",
) -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{color}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'


def draw(caption: str, phases: dict[str, Series]) -> str:
    """The whole picture."""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for i, (phase, title) in enumerate(TITLES.items()):
        if phase in phases:
            named = {name: phases[phase][name] for name in NAMES if name in phases[phase]}
            out += Panel(LEFT + i * GAP, title, named).draw()
    return "\n".join([*out, text(LEFT, HEIGHT - 12, caption), "</svg>"]) + "\n"


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw(*read(source)), encoding="utf-8")


if __name__ == "__main__":
    main()
