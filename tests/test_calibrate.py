"""A certificate is wrong as seldom as it says, by simulation; and the command writes what holds."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hipserve import ArgumentError, FitError, HiPConfig
from hipserve.cli.main import app
from hipserve.lab import Document, calibrate, rule_card
from hipserve.lab.calibration.candidates import candidates, halves, keys_read
from hipserve.lab.calibration.certificate import (
    MIN_DOCUMENTS,
    Half,
    Pairs,
    accepts,
    bound,
    missing_documents,
    walk,
)
from hipserve.lab.intervals import student
from hipserve.lab.text import language_reference
from hipserve.models import LoadedModel, load

LIMIT, CONFIDENCE = 0.005, 0.9
NAMES = [f"budget {2**i}" for i in range(12, 6, -1)]
SMALL = HiPConfig(
    budget=64, num_sink_tokens=16, sliding_window=32, query_block_size=16, rerank=0, bound_reach=0.5
)

Shape = Callable[[random.Random], float]


def normal(rng: random.Random) -> float:
    return rng.gauss(0, 1)


def skewed(rng: random.Random) -> float:
    """Log-normal, centred, of deviation 1: a few documents lose far more than the others."""
    return (math.exp(0.5 * rng.gauss(0, 1)) - math.exp(0.125)) / 0.604


def split(
    rng: random.Random, losses: dict[str, float], spread: float, count: int, shape: Shape
) -> Callable[[str, Half], Pairs]:
    """Documents of either half, each with its own likelihood and its own share of every loss."""

    def half() -> Callable[[str], Pairs]:
        dense = [max(rng.gauss(2.2, 0.4), 0.5) for _ in range(count)]
        own = [shape(rng) for _ in range(count)]

        def pairs(name: str) -> Pairs:
            noise = [spread * (0.8 * x + 0.6 * rng.gauss(0, 1)) for x in own]
            return Pairs(
                dense, [d * (1 + losses[name] + e) for d, e in zip(dense, noise, strict=True)]
            )

        return pairs

    made = {"choose": half(), "report": half()}
    seen: dict[tuple[str, str], Pairs] = {}

    def measure(name: str, which: Half) -> Pairs:
        return seen.setdefault((name, which), made[which](name))

    return measure


def ladder(rng: random.Random) -> dict[str, float]:
    """True losses that grow as the budget falls, some of them near to the limit."""
    start = rng.uniform(-0.4, 1.2) * LIMIT
    steps = [rng.uniform(0, 0.6) * LIMIT for _ in NAMES]
    return {name: start + sum(steps[:i]) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize(("shape", "count"), [(normal, 6), (normal, 12), (skewed, 8), (skewed, 20)])
def test_a_certificate_is_wrong_at_most_as_often_as_stated(shape: Shape, count: int) -> None:
    rng, rounds, wrong, given = random.Random(1), 300, 0, 0
    for _ in range(rounds):
        losses = ladder(rng)
        measure = split(rng, losses, 0.4 * LIMIT, count, shape)
        found = walk(NAMES, measure, LIMIT, CONFIDENCE).certified
        given += found is not None
        wrong += found is not None and losses[found.name] > LIMIT
    noise = 3 * math.sqrt(0.1 * 0.9 / rounds)
    assert wrong / rounds <= 1 - CONFIDENCE + noise
    assert given > 0.3 * rounds, "a certificate that is never given is never wrong"


def test_at_the_limit_it_errs_at_the_stated_rate_and_no_less_than_it_can() -> None:
    """The hardest case: every candidate loses a hair more than allowed."""
    rng, rounds, wrong = random.Random(2), 300, 0
    losses = dict.fromkeys(NAMES, LIMIT * 1.001)
    for _ in range(rounds):
        measure = split(rng, losses, 0.4 * LIMIT, 8, skewed)
        wrong += walk(NAMES, measure, LIMIT, CONFIDENCE).certified is not None
    assert 0.01 < wrong / rounds <= 1 - CONFIDENCE + 3 * math.sqrt(0.1 * 0.9 / rounds)


def test_one_pool_of_documents_divided_anew() -> None:
    """The same 60 documents, 150 times in other halves; the truth is that of all of them."""
    rng, rounds, wrong = random.Random(3), 150, 0
    losses = {name: (i + 0.5) * LIMIT / 3 for i, name in enumerate(NAMES)}
    pool = split(rng, losses, 0.5 * LIMIT, 60, skewed)
    everything = {name: pool(name, "report") for name in NAMES}
    for _ in range(rounds):
        order = rng.sample(range(60), 24)
        parts = {"choose": order[:12], "report": order[12:]}

        def measure(name: str, half: Half, parts: dict[str, list[int]] = parts) -> Pairs:
            dense, pruned = everything[name]
            return Pairs([dense[i] for i in parts[half]], [pruned[i] for i in parts[half]])

        found = walk(NAMES, measure, LIMIT, CONFIDENCE).certified
        wrong += found is not None and everything[found.name].loss > LIMIT
    assert wrong / rounds <= 1 - CONFIDENCE + 3 * math.sqrt(0.1 * 0.9 / rounds)


def test_what_holds_clearly_is_found() -> None:
    rng, found = random.Random(4), list[str]()
    losses = {name: x * LIMIT for name, x in zip(NAMES, (0, 0.1, 0.2, 0.3, 2, 4), strict=True)}
    for _ in range(100):
        certified = walk(NAMES, split(rng, losses, 0.4 * LIMIT, 10, normal), LIMIT, CONFIDENCE)
        found.append(certified.certified.name if certified.certified else "")
    assert found.count("budget 512") >= 80


def test_the_worst_document_counts_twice_for_a_reason() -> None:
    """Of skewed losses at the limit, Student's test alone accepts too many."""
    rng, plain, ours = random.Random(5), 0, 0
    for _ in range(1000):
        over = [skewed(rng) for _ in range(8)]
        error = statistics.stdev(over) / math.sqrt(8)
        plain += statistics.fmean(over) + student(CONFIDENCE, 7) * error <= 0
        pairs = Pairs([1.0] * 8, [1 + LIMIT * (1 + 0.3 * x) for x in over])
        ours += accepts(pairs, LIMIT, CONFIDENCE)
    assert ours / 1000 < 0.13 < 0.16 < plain / 1000


def test_the_bound_is_where_the_test_turns() -> None:
    rng = random.Random(6)
    pairs = split(rng, {"x": 0.003}, 0.001, 12, skewed)("x", "report")
    upper = bound(pairs, CONFIDENCE)
    assert upper is not None
    assert pairs.loss < upper < 0.005
    assert accepts(pairs, upper + 1e-6, CONFIDENCE)
    assert not accepts(pairs, upper - 1e-6, CONFIDENCE)
    assert bound(pairs, 0.99) > upper  # type: ignore[operator]
    few = Pairs(pairs.dense[: MIN_DOCUMENTS - 1], pairs.pruned[: MIN_DOCUMENTS - 1])
    assert bound(few, CONFIDENCE) is None


def test_so_many_more_documents_decide() -> None:
    """With as many as it says, the limit is accepted about four times in five."""
    rng, spread = random.Random(7), 0.8 * LIMIT
    typical = [statistics.NormalDist(0.6 * LIMIT, spread).inv_cdf((i + 0.5) / 8) for i in range(8)]
    more = missing_documents(Pairs([2.2] * 8, [2.2 * (1 + x) for x in typical]), LIMIT, CONFIDENCE)
    assert more is not None
    accepted = [
        accepts(
            split(rng, {"x": 0.6 * LIMIT}, spread, 8 + more, normal)("x", "report"),
            LIMIT,
            CONFIDENCE,
        )
        for _ in range(300)
    ]
    assert 0.65 < statistics.fmean(accepted) < 0.95
    hopeless = Pairs([2.0] * 8, [2.1 + 0.001 * i for i in range(8)])
    assert missing_documents(hopeless, LIMIT, CONFIDENCE) is None


def documents(count: int, size: int = 2500) -> list[Document]:
    text = language_reference()
    step = (len(text) - size) // count
    return [Document(f"part {i}", "docs", text[i * step : i * step + size]) for i in range(count)]


def test_halves_do_not_depend_on_the_order() -> None:
    docs = documents(11)
    choose, report = halves(docs)
    assert (len(choose), len(report)) == (5, 6)
    assert set(choose) | set(report) == set(docs)
    again = halves(docs[::-1])
    assert again == (choose, report)
    mixed = [Document(d.name, "a" if i < 4 else "b", d.text) for i, d in enumerate(docs)]
    assert [d.domain for d in halves(mixed)[1]].count("a") == 2, "half of every domain"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(device="cpu")


def test_the_sequence_falls_in_cost(loaded: LoadedModel) -> None:
    found = candidates(loaded, HiPConfig(dense_layers=[3]), 16384)
    keys = [keys_read(config, 12, 16384) for config in found.values()]
    assert keys == sorted(keys, reverse=True)
    assert len(found) > 10
    assert all(3 in config.dense_layers for config in found.values())
    assert found["budget 512, rerank 4, dense layers 0,3"].dense_layers == (0, 3)
    tree = candidates(loaded, HiPConfig(selector="tree"), 16384)
    assert "budget 512" in tree
    assert candidates(loaded, HiPConfig(), 500) == {}


def test_a_model_is_calibrated(loaded: LoadedModel) -> None:
    made = calibrate(
        loaded, documents(12), base=SMALL, max_loss=0.01, length=320, first=200, confidence=0.8
    )
    assert (len(made.choose), len(made.report)) == (6, 6)
    assert made.caught
    assert made.blind_loss > 0.01
    assert made.config is not None
    assert made.config.dense_below is None, "as the base leaves it"
    table = made.config.calibration
    assert table is not None
    assert table["bound"] <= 0.01
    assert table["report"] == made.report
    assert HiPConfig.loads(made.config.dumps(), "toml").calibration == table
    card = rule_card(made)
    assert card[0].startswith(f"HiP with {made.best}: a loss of at most 1.00% at 320 tokens")
    assert any(line.startswith("dense attention is preferable below") for line in card)
    for below, said in ((3072, True), (256, False)):
        card = "; ".join(rule_card(replace(made, dense_below=below)))
        assert ("this configuration changes nothing at 320 tokens" in card) is said
        assert ("calibrate at more than 3,072" in card) is said


def test_texts_that_show_nothing_certify_nothing(loaded: LoadedModel) -> None:
    """Sinks and window alone keep to the limit: whatever else does, too, says little."""
    made = calibrate(loaded, documents(2), base=SMALL, max_loss=0.9, length=320)
    assert not made.caught
    assert made.config is None
    assert "sinks and window alone lose" in rule_card(made)[0]


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["calibrate", *words])


def write(path: Path, docs: Sequence[Document]) -> str:
    path.write_text("\n".join(json.dumps({"title": d.name, "text": d.text}) for d in docs))
    return str(path)


def test_the_command_writes_what_runs(tmp_path: Path) -> None:
    text, base, out = write(tmp_path / "t.jsonl", documents(12)), tmp_path / "base.toml", "hip.toml"
    base.write_text(SMALL.dumps())
    words = ["--text", text, "--config", str(base), "--length", "320", "--max-loss", "1%"]
    words += ["--confidence", "75%", "--device", "cpu", "--out", str(tmp_path / out)]
    shown = invoke(*words)
    assert shown.exit_code == 0, shown.stdout + shown.stderr
    assert "holds" in shown.stdout
    assert "HiP with budget" in shown.stdout
    config = HiPConfig.load(tmp_path / out)
    assert config.calibration is not None
    assert config.calibration["length"] == 320
    asked = CliRunner().invoke(
        app, ["eval", "perplexity", "--config", str(tmp_path / out), "--length", "200", "--json"]
    )
    assert json.loads(asked.stdout)["configs"]["hip"]["calibration"]["max_loss"] == 0.01


def test_too_few_documents_are_not_certified(tmp_path: Path) -> None:
    text, base = write(tmp_path / "t.jsonl", documents(4)), tmp_path / "base.toml"
    base.write_text(SMALL.dumps())
    out = tmp_path / "hip.toml"
    words = ["--text", text, "--config", str(base), "--length", "320", "--max-loss", "1%"]
    shown = invoke(*words, "--out", str(out), "--device", "cpu", "--json")
    assert shown.exit_code == 5
    result = json.loads(shown.stdout)
    assert result["certified"] is False
    assert "more documents" in result["card"][0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_loss": 0.0}, ArgumentError),
        ({"confidence": 1.0}, ArgumentError),
        ({"confidence": 0.3}, ArgumentError),
        ({"first": 700}, ArgumentError),
        ({"length": 1 << 20}, FitError),
        ({"base": HiPConfig(sliding_window=1024)}, FitError),
    ],
)
def test_mistakes_are_named(
    loaded: LoadedModel, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        calibrate(loaded, documents(2), **{"length": 600, "base": SMALL, **options})


def test_one_document_cannot_be_divided(loaded: LoadedModel) -> None:
    with pytest.raises(FitError, match="to choose by"):
        calibrate(loaded, documents(1), length=600, base=SMALL)


def test_provenance_is_kept_and_dropped() -> None:
    table = {"max_loss": 0.005, "texts": ["a", "b"], "statement": 'say "so"'}
    config = HiPConfig(budget=512, calibration=table)
    assert config == HiPConfig(budget=512)
    assert hash(config) == hash(HiPConfig(budget=512))
    assert "calibration" not in HiPConfig().to_dict()
    for form in ("toml", "json"):
        assert HiPConfig.loads(config.dumps(form), form).calibration == table
    assert config.replace(budget=256).calibration is None, "nobody calibrated that"
    with pytest.raises(ArgumentError, match="calibration: expected a table"):
        HiPConfig(calibration={"a": {"b": 1}})
    with pytest.raises(ArgumentError, match="calibration: expected a table"):
        HiPConfig.loads("calibration = 5", "toml")
