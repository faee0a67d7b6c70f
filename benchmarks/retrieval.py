"""Retrieval with all tasks in one document: what `hipserve eval retrieval` asks, at less cost.

    python benchmarks/retrieval.py --length 32k --documents 8

Every document hides one pass key, eight needles, 32 hexadecimal pairs and one chain of variables at
random depths of the Python language reference. It is read once under each configuration; then each
question continues from what was read, as a follow-up question of a conversation does, and its
answer is decoded token by token with the configuration's own reuse of selections.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

from hipserve import HiPConfig
from hipserve.cli.numbers import parse_count
from hipserve.lab.intervals import mean, wilson
from hipserve.lab.quality.puzzle import MEMORIZE, Question
from hipserve.lab.quality.retrieval import encode, score
from hipserve.lab.quality.tasks import PUZZLES, Sample, plant
from hipserve.lab.text import language_reference
from hipserve.models import LoadedModel, load
from options import launch

QUESTIONS = 8
"""Asked about a document, of tasks that have so many."""


def make_document(seed: int, text: str, characters: int) -> tuple[str, dict[str, list[Question]]]:
    """A stretch of the text with the facts of all tasks planted, and their questions."""
    rng = random.Random(f"many {seed}")
    start = rng.randrange(len(text) - characters)
    puzzles = {task: make(rng) for task, make in PUZZLES.items()}
    facts = [fact for puzzle in puzzles.values() for fact in puzzle.facts]
    order = list(range(len(facts)))
    rng.shuffle(order)
    order = keep_chains(facts, order)
    depths = sorted(rng.random() for _ in facts)
    stretch = text[start : start + characters]
    document = plant(stretch, [facts[i] for i in order], depths)
    questions = {task: puzzle.questions[:QUESTIONS] for task, puzzle in puzzles.items()}
    return f"{MEMORIZE}\n\n{document}", questions


def keep_chains(facts: list[str], order: list[int]) -> list[int]:
    """Assignments stay in order: a variable is set before it is used."""
    places = [place for place, i in enumerate(order) if facts[i].startswith("VAR")]
    chain = sorted(order[place] for place in places)
    for place, i in zip(places, chain, strict=True):
        order[place] = i
    return order


def fit(
    loaded: LoadedModel, seed: int, text: str, length: int
) -> tuple[str, dict[str, list[Question]]]:
    """The longest document of this seed that leaves room for a question and its answer."""
    size = length * 4
    while True:
        document, questions = make_document(seed, text, min(size, len(text) - 1))
        tokens = encode(loaded, document, questions["passkey"][0]).shape[1]
        if tokens <= length - 128:
            return document, questions
        size = int(size * 0.99 * (length - 128) / tokens)


def ask(
    loaded: LoadedModel, config: HiPConfig, document: str, questions: dict[str, list[Question]]
) -> list[tuple[str, float]]:
    """Scores of all questions: exact answers 1 or 0, variables the share of right tokens."""
    every = [(task, question) for task, asked in questions.items() for question in asked]
    sample = Sample(document, tuple(question for _, question in every), exact=False)
    shares = score(loaded, config, sample)
    return [
        (task, share if task == "variables" else float(share == 1))
        for (task, _), share in zip(every, shares, strict=True)
    ]


def configurations(names: str) -> dict[str, HiPConfig]:
    """`dense` is our dense kernel: a budget of everything."""
    known: dict[str, Any] = {"dense": HiPConfig(budget=2**20)}
    found: dict[str, HiPConfig] = {}
    for name in names.split(","):
        preset, *changes = name.split("+")
        values = {key: value for key, _, value in (change.partition("=") for change in changes)}
        base = known.get(preset) or HiPConfig.preset(preset)
        found[name] = base.replace(**{key: parse_count(value) for key, value in values.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=parse_count, default=32768)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--configs", default="dense,default", help="presets; +field=number varies")
    parser.add_argument("--json")
    options = parser.parse_args()
    configs = configurations(options.configs)
    loaded, text = load(), language_reference()
    scores: dict[str, dict[str, list[float]]] = {}
    for seed in range(options.first, options.first + options.documents):
        document, questions = fit(loaded, seed, text, options.length)
        for name, config in configs.items():
            began = time.perf_counter()
            for task, right in ask(loaded, config, document, questions):
                scores.setdefault(name, {}).setdefault(task, []).append(right)
            summary = {task: round(mean(v), 3) for task, v in scores[name].items()}
            sys.stderr.write(f"{seed} {name} {summary} {time.perf_counter() - began:.0f} s\n")
        write(options, scores, seed + 1 - options.first)


def write(
    options: argparse.Namespace, scores: dict[str, dict[str, list[float]]], documents: int
) -> None:
    table = {
        name: {
            task: {
                "score": mean(values),
                "questions": len(values),
                "interval": None
                if task == "variables"
                else wilson(round(sum(values)), len(values)),
            }
            for task, values in tasks.items()
        }
        for name, tasks in scores.items()
    }
    report = {"length": options.length, "documents": documents, "scores": table}
    text = json.dumps(report, indent=1) + "\n"
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    launch(main)
