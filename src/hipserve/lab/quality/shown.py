"""Fidelity and answers as tables, sentences and charts."""

from __future__ import annotations

from collections.abc import Callable

from hipserve.lab.quality.controls import CONTROLS
from hipserve.lab.quality.costs import frontier
from hipserve.lab.quality.fidelity import Fidelity, FidelityReport
from hipserve.lab.quality.retrieval import RetrievalReport, TaskResult
from hipserve.lab.shown import Chart, Grid, Line, counted, with_interval
from hipserve.lab.verdicts import Verdict


def grid(report: FidelityReport) -> Grid:
    """A row for each attention."""
    title = (
        f"{report.model}, positions {report.first:,} to {report.length:,}, "
        f"{counted(len(report.documents), 'document')}"
    )
    headings = ["attention", "nll", "change", "KL", "KL p99", "same top-1", "far nats", "verdict"]
    rows = [[name, *_cells(row)] for name, row in report.results.items()]
    count = next(iter(report.results.values())).far_tokens
    caption = (
        f"95 % intervals over {report.unit}; far nats: change of the {count:,} tokens that need "
        "far context"
    )
    return Grid(title, headings, rows, caption)


def _cells(row: Fidelity) -> list[str]:
    return [
        f"{row.mean:.4f}",
        with_interval(row.change, row.interval, "+.2%"),
        with_interval(row.kl, row.kl_interval, ".4f"),
        f"{row.kl_p99:.3f}",
        with_interval(row.same_top, row.same_top_interval, ".1%"),
        "" if row.far is None else with_interval(row.far, row.far_interval, "+.3f"),
        row.decision or "",
    ]


Measure = Callable[[FidelityReport, str], float]
COSTS: dict[str, Measure] = {
    "keys read, %": lambda report, name: 100 * report.costs[name].share,
    "seconds a text": lambda report, name: report.costs[name].seconds_a_text,
}


def pareto(report: FidelityReport, cost: str) -> list[str]:
    """The attentions than which no other costs less and has a smaller KL."""
    return frontier(
        report.judged(), lambda n: COSTS[cost](report, n), lambda n: report.results[n].kl
    )


def costs_grid(report: FidelityReport) -> Grid:
    """What each attention costs, and whether another is better and cheaper."""
    best = {cost: pareto(report, cost) for cost in COSTS}
    rows = [
        [
            name,
            f"{report.results[name].kl:.4f}",
            *(f"{of(report, name):.1f}{' *' * (name in best[cost])}" for cost, of in COSTS.items()),
        ]
        for name in report.judged()
    ]
    caption = (
        "* in the Pareto set: no other costs less and has a smaller KL; seconds are of processor "
        "time on a CPU, of the whole model, with the logits of dense attention beside its own"
    )
    return Grid(
        f"{report.model}: what is lost for a cost", ["attention", "KL", *COSTS], rows, caption
    )


def sentences(report: FidelityReport) -> list[str]:
    """The verdicts on each attention that was judged."""
    return [
        f"{name}: {_verdicts(row, report.unit)}"
        for name, row in report.results.items()
        if row.verdicts
    ]


def _verdicts(row: Fidelity, unit: str) -> str:
    return ", ".join(
        f"{name} {verdict_words(verdict, unit)}" for name, verdict in row.verdicts.items()
    )


def verdict_words(verdict: Verdict, unit: str) -> str:
    """The decision, its margin, and how many more units would settle it."""
    within = f"{verdict.decision} (margin {verdict.margin:g}"
    if verdict.decision != "undecided":
        return f"{within})"
    if verdict.more is None:
        return f"{within}: too near to it)"
    return f"{within}: {verdict.more:,} {unit} more)"


def answers_grid(report: RetrievalReport) -> Grid:
    """A row for each task and attention."""
    title = f"{report.model}, {report.length:,} tokens, by {report.form}"
    headings = ["task", "attention", "score", "change", "lost", "gained", "nats", "verdict"]
    rows = [
        [f"{row.task} ({row.samples})", name, *_answers_cells(row, name)]
        for row in report.results
        for name in report.configs
    ]
    caption = "95 % intervals over documents; nats: change of the right answer's logarithm"
    return Grid(title, headings, rows, caption)


def _answers_cells(row: TaskResult, name: str) -> list[str]:
    score = f"{row.scores[name].mean:.3f}"
    if name not in row.flips:
        return [score, *[""] * 5]
    flips, change = row.flips[name], row.difference[name]
    return [
        score,
        with_interval(change.mean, change.interval, "+.1%"),
        str(flips.lost),
        str(flips.gained),
        with_interval(flips.nats, flips.nats_interval, "+.3f"),
        flips.verdict.decision,
    ]


def answers_sentences(report: RetrievalReport) -> list[str]:
    """The verdict on each task under each attention."""
    return [
        f"{row.task}, {name}: answers {verdict_words(flips.verdict, 'questions')}"
        for row in report.results
        for name, flips in row.flips.items()
    ]


def charts(report: FidelityReport) -> list[Chart]:
    """Loss of each domain, for what is neither the reference nor a control."""
    (_, dense), *others = report.results.items()
    base = dense.by_domain
    domains = list(base)
    lines = [
        Line(name, domains, [100 * (row.by_domain[d] / own - 1) for d, own in base.items()], "dots")
        for name, row in others
        if name not in CONTROLS
    ]
    changes = Chart("change of the negative log-likelihood", "domain", "%", lines)
    return [changes, *(_tradeoff(report, cost) for cost in COSTS if len(report.judged()) > 1)]


def _tradeoff(report: FidelityReport, cost: str) -> Chart:
    """KL against a cost: every attention by itself, the Pareto set joined."""

    def points(names: list[str]) -> tuple[list[float], list[float]]:
        chosen = sorted(names, key=lambda name: COSTS[cost](report, name))
        return [COSTS[cost](report, n) for n in chosen], [report.results[n].kl for n in chosen]

    dots = [Line(name, *points([name]), "dots") for name in report.judged()]
    best = Line("Pareto set", *points(pareto(report, cost)))
    return Chart("what is lost for a cost", cost, "KL in nats", [best, *dots])
