"""Retrieval with many questions a document: what `hipserve eval retrieval` asks, at less cost.

    python benchmarks/retrieval.py --length 32k --documents 8 --json docs/data/retrieval-32k.json

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

import torch

from hipserve import HiPConfig
from hipserve.cli.numbers import parse_count
from hipserve.evaluate.intervals import mean, wilson
from hipserve.evaluate.passes import make_cache, prefill
from hipserve.evaluate.tasks import MEMORIZE, PUZZLES, plant
from hipserve.evaluate.text import language_reference
from hipserve.models import LoadedModel, load

Question = tuple[str, str, str]
NIAH, KV = 8, 8
"""Questions a document of these tasks."""


def make_document(seed: int, text: str, characters: int) -> tuple[str, list[Question]]:
    """A stretch of the text with all facts planted, and `(task, question, answer)` of each."""
    rng = random.Random(f"many {seed}")
    start = rng.randrange(len(text) - characters)
    facts: list[str] = []
    questions: list[Question] = []
    for task, make in PUZZLES.items():
        puzzle = make(rng)
        facts += puzzle.facts
        questions.append((task, puzzle.question, puzzle.answer))
        questions += others(task, puzzle.facts, puzzle.question)
    order = list(range(len(facts)))
    rng.shuffle(order)
    order = keep_chains(facts, order)
    depths = sorted(rng.random() for _ in facts)
    stretch = text[start : start + characters]
    document = plant(stretch, [facts[i] for i in order], depths)
    return f"{MEMORIZE}\n\n{document}", questions


def keep_chains(facts: list[str], order: list[int]) -> list[int]:
    """Assignments stay in order: a variable is set before it is used."""
    places = [place for place, i in enumerate(order) if facts[i].startswith("VAR")]
    chain = sorted(order[place] for place in places)
    for place, i in zip(places, chain, strict=True):
        order[place] = i
    return order


def others(task: str, facts: list[str], asked: str) -> list[Question]:
    """Questions about the facts that a puzzle hides but does not ask for."""
    if task == "niah":
        pairs = [fact.removesuffix(".").split(" for ")[1].split(" is: ") for fact in facts]
        form = "What is the special magic number for {} mentioned in the provided text?"
        reply = "The special magic number for {} mentioned in the provided text is {}"
        found = [(task, form.format(k), reply.format(k, v)) for k, v in pairs]
        return [question for question in found if question[1] != asked][: NIAH - 1]
    if task == "kv":
        pairs = [fact.removesuffix(",").replace('"', "").split(": ") for fact in facts]
        form, reply = 'Which value is stored under the key "{}"?', '"{}": "{}'
        found = [(task, form.format(k), reply.format(k, v)) for k, v in pairs]
        return [question for question in found if question[1] != asked][: KV - 1]
    return []


def fit(loaded: LoadedModel, seed: int, text: str, length: int) -> tuple[str, list[Question]]:
    """The longest document of this seed that leaves room for a question and its answer."""
    size = length * 4
    while True:
        document, questions = make_document(seed, text, min(size, len(text) - 1))
        tokens = encode(loaded, document, questions[0][1]).shape[1]
        if tokens <= length - 128:
            return document, questions
        size = int(size * 0.99 * (length - 128) / tokens)


def encode(loaded: LoadedModel, document: str, question: str) -> torch.Tensor:
    return loaded.encode([{"role": "user", "content": text} for text in (document, question)])


@torch.no_grad()
def ask(loaded: LoadedModel, document: str, questions: list[Question]) -> list[tuple[str, float]]:
    """Scores of all questions: exact answers 1 or 0, variables the share of right tokens."""
    prompts = [encode(loaded, document, question) for _, question, _ in questions]
    common = common_prefix(prompts)
    cache = make_cache(loaded)
    for _ in prefill(loaded, prompts[0][:, :common], cache):
        pass
    scores: list[tuple[str, float]] = []
    for (task, _, answer), prompt in zip(questions, prompts, strict=True):
        ids = loaded.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        answer_ids = ids[0].to(loaded.device)
        tokens = prompt[:, common:]
        logits = loaded.model(tokens, past_key_values=cache, use_cache=True).logits
        hits: list[float] = []
        for token in answer_ids:
            hits.append(float(logits[0, -1].argmax() == token))
            step = token.view(1, 1)
            logits = loaded.model(step, past_key_values=cache, use_cache=True).logits
        cache.crop(-(tokens.shape[1] + len(answer_ids)))
        scores.append((task, mean(hits) if task == "variables" else float(all(hits))))
    return scores


def common_prefix(prompts: list[torch.Tensor]) -> int:
    shortest = min(prompt.shape[1] for prompt in prompts)
    same = torch.ones(shortest, dtype=torch.bool)
    for prompt in prompts:
        same &= (prompt[0, :shortest] == prompts[0][0, :shortest]).cpu()
    return int(same.int().cumprod(0).sum())


def configurations(names: str) -> dict[str, HiPConfig]:
    """`dense` is our dense kernel: a budget of everything."""
    known: dict[str, Any] = {"dense": HiPConfig(budget=2**20)}
    found: dict[str, HiPConfig] = {}
    for name in names.split(","):
        preset, *changes = name.split("+")
        values = dict(change.split("=") for change in changes)
        base = known.get(preset) or HiPConfig.preset(preset)
        found[name] = base.replace(**{key: int(value) for key, value in values.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=parse_count, default=32768)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--configs", default="dense,default", help="presets; +field=number varies")
    parser.add_argument("--json")
    options = parser.parse_args()
    loaded, text = load(), language_reference()
    scores: dict[str, dict[str, list[float]]] = {}
    for seed in range(options.first, options.first + options.documents):
        document, questions = fit(loaded, seed, text, options.length)
        for name, config in configurations(options.configs).items():
            loaded.use(config)
            began = time.perf_counter()
            for task, score in ask(loaded, document, questions):
                scores.setdefault(name, {}).setdefault(task, []).append(score)
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
    main()
