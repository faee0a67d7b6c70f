"""Draws the speed of attention as an SVG, from a CSV of either benchmark.

python benchmarks/plot.py docs/data/attention-cpu.csv docs/speed.svg
python benchmarks/plot.py docs/data/attention-h200.csv docs/speed-gpu.svg
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

NAMES = {"sdpa": "torch SDPA", "dense": "our dense kernel", "hip": "HiP"}
COLORS = {"sdpa": "#8a8a8a", "dense": "#4477aa", "hip": "#cc3311"}
TITLES = {"prefill": "Prefill of one layer", "decode": "One decode step of one layer"}

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
    """The same from `benchmarks/gpu.py speed`: batch 1, 16 bits, every decode step selecting.

    Graphs for longer sequences than the one in them are left out.
    """
    phases: dict[str, Series] = {}
    alone = [
        row
        for row in rows
        if row["batch"] == "1"
        and row.get("room") in (None, "", row["length"])
        and row.get("pages", "bfloat16") == "bfloat16"
    ]
    for row in sorted(alone, key=lambda row: int(row["length"])):
        prefill = row["what"] == "prefill"
        names = ("dense_ms", "hip_ms") if prefill else ("dense_us", "refresh1_us")
        for contender, name in zip(("sdpa", "hip"), names, strict=True):
            seconds = float(row[name]) * (1e-3 if prefill else 1e-6)
            series = phases.setdefault(row["what"], {})
            series.setdefault(contender, []).append((int(row["length"]), seconds))
    return phases


def label_length(length: float, _: int) -> str:
    power, unit = (20, "M") if length >= 2**20 else (10, "k") if length >= 2**10 else (0, "")
    return f"{length / 2**power:g}{unit}"


def draw_phase(axes: Axes, title: str, series: Series) -> None:
    """Time against length, and how many times as fast as SDPA at the last length."""
    for name, label in NAMES.items():
        if name not in series:
            continue
        lengths, seconds = zip(*sorted(series[name]), strict=True)
        axes.plot(lengths, seconds, color=COLORS[name], marker="o", markersize=3, label=label)
        ratio = sorted(series["sdpa"])[-1][1] / seconds[-1]
        times = "" if name == "sdpa" else f"  {ratio:.3g}x"
        axes.annotate(times, (lengths[-1], seconds[-1]), color=COLORS[name], va="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(title=title, xlabel="tokens")
    axes.set_xlim(0.8 * min(series["sdpa"])[0], 3 * max(series["sdpa"])[0])
    axes.xaxis.set_major_formatter(FuncFormatter(label_length))
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw(caption: str, phases: dict[str, Series], target: Path) -> None:
    shown = [phase for phase in TITLES if phase in phases]
    with rc_context({"svg.hashsalt": caption, "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        for axes, phase in zip(
            figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
        ):
            draw_phase(axes, TITLES[phase], phases[phase])
        figure.supxlabel(caption, fontsize=8)
        figure.savefig(target, format="svg", metadata={"Date": None})


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    draw(*read(source), target)


if __name__ == "__main__":
    main()
