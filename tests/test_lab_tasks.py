"""Long-range tasks hide what they ask for, aggregation defeats a budget, verdicts are corrected."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hipserve import ArgumentError, HiPConfig
from hipserve.cli.main import app
from hipserve.lab import Document, evaluate_fidelity, make_sample
from hipserve.lab.intervals import Estimate, estimate, student, student_above
from hipserve.lab.quality import depth, far
from hipserve.lab.quality.controls import blind
from hipserve.lab.quality.long_range import OFTEN, SELDOM
from hipserve.lab.quality.retrieval import Flips, Score, TaskResult, encode_questions, score
from hipserve.lab.quality.tasks import PUZZLES, Sample
from hipserve.lab.text import language_reference
from hipserve.lab.verdicts import Verdict, judge, judge_all
from hipserve.models import LoadedModel, load

SMALL = HiPConfig(
    budget=64, num_sink_tokens=16, sliding_window=64, query_block_size=16, dense_below=0
)
TEXT = language_reference()


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(device="cpu")


def words(sample: Sample) -> int:
    return len(sample.document) // 3


def make(task: str, seed: int = 0, **options: Any) -> Sample:
    return make_sample(task, TEXT, 4000, words, seed, **options)


@pytest.mark.parametrize("task", list(PUZZLES))
def test_samples_are_seeded_and_hold_what_they_ask_for(task: str) -> None:
    sample = make(task)
    assert sample == make(task)
    assert sample != make(task, seed=1)
    for number in re.findall(r"\b\d{5,7}\b", sample.questions[0].completion):
        assert number in sample.document


def test_every_word_of_a_key_belongs_to_other_keys() -> None:
    sample = make("multikey")
    key = re.findall(r"number for (\w+) (\w+) mentioned", sample.questions[0].question)[0]
    facts = re.findall(r"numbers for (\w+) (\w+) is: (\d+)", sample.document)
    assert len(facts) == 49
    assert [sum(word in fact[:2] for fact in facts) for word in key] == [7, 7]
    (value,) = [v for a, b, v in facts if (a, b) == key]
    assert sample.questions[0].completion == f" {value}"


def test_values_come_in_the_order_of_the_text() -> None:
    sample = make("multivalue")
    (key,) = re.findall(r"numbers for (\w+) are:", sample.questions[0].cue)
    found = re.findall(rf"numbers for {key} is: (\d+)", sample.document)
    assert len(found) == 4
    assert sample.questions[0].completion == " " + ", ".join(found)
    assert not sample.exact


def test_a_chain_is_followed_through_others() -> None:
    sample = make("chains")
    names = sample.questions[0].answer.split()
    source = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.document))
    assert len(source) == 20
    for name, before in zip(names[1:], names, strict=False):
        assert source[name] == before
    assert source[names[0]] in sample.questions[0].question


def test_the_frequent_word_is_the_more_frequent_one() -> None:
    sample = make("frequent")
    found = re.findall(r"word of the day is (\w+)\.", sample.document)
    more = sample.questions[0].completion.strip()
    assert (found.count(more), len(found)) == (OFTEN, OFTEN + SELDOM)


def test_the_first_of_two_values_stands_before_the_other() -> None:
    sample = make("order", questions=4)
    found = re.findall(r"numbers for (\w+) is: (\d+)", sample.document)
    assert len(found) == len(set(found)) == 8
    for question in sample.questions:
        (key,) = re.findall(r"numbers for (\w+) comes first", question.question)
        first, second = [value for name, value in found if name == key]
        assert question.completion == f" {first}"
        assert question.answer.endswith(f" {first}")
        assert second not in question.answer
    assert len({question.cue for question in sample.questions}) == 4


@pytest.mark.parametrize("task", ["niah", "kv", "multikey", "passkey", "quote"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_depth_is_where_the_answer_stands(task: str, place: float) -> None:
    sample = make(task, depth=place)
    text = sample.document
    found = text.rindex(sample.questions[0].completion.strip()) / len(text)
    assert found == pytest.approx(place, abs=0.15)


def test_a_depth_needs_one_place() -> None:
    with pytest.raises(ArgumentError, match="in one place"):
        make("chains", depth=0.5)
    with pytest.raises(ArgumentError, match="in one place"):
        make("order", depth=0.5)
    with pytest.raises(ArgumentError, match="depth: expected a share"):
        make("niah", depth=1.5)


def test_aggregation_defeats_a_budget(loaded: LoadedModel) -> None:
    """Most of 160 places stay unread: the right answer becomes less likely than under dense."""

    def count(sample: Sample) -> int:
        return len(loaded.tokenizer(sample.document)["input_ids"])

    changes: list[float] = []
    for seed in range(2):
        sample = make_sample("frequent", TEXT, 2500, count, seed)
        asked = encode_questions(loaded, sample, "continuation")
        nats = [score(loaded, config, asked, True)[0].nats for config in (None, blind(SMALL))]
        changes.append(nats[1] - nats[0])
    assert sum(changes) / len(changes) < -0.05


def planted(lost: int, gained: int, samples: int = 20, dense: float = 1.0) -> TaskResult:
    """A cell in which so many answers changed."""
    verdict = Verdict("undecided", 0.02, None)
    name, change = "sinks + window", (gained - lost) / samples
    scores = {"dense": Score(dense, None), name: Score(dense + change, None)}
    flips = Flips(lost, gained, -1.0, None, verdict)
    return TaskResult("niah", samples, scores, {name: Score(change, None)}, {name: flips})


@pytest.mark.parametrize(
    ("lost", "gained", "warning"), [(12, 0, ""), (0, 0, "not caught"), (0, 12, "beyond noise")]
)
def test_all_cells_together_decide(lost: int, gained: int, warning: str) -> None:
    cells = [depth.Cell(1000, x, planted(lost, gained)) for x in (0.0, 1.0)]
    overall = {"sinks + window": depth._overall(cells, "sinks + window", 0.02)}
    assert overall["sinks + window"].verdict.decision == (
        "different" if lost or gained else "undecided"
    )
    found = depth._warnings(cells, overall, "dense")
    assert any(warning in line for line in found) if warning else found == []
    weak = [depth.Cell(1000, 0.5, planted(0, 0, dense=0.2))]
    assert "1,000 tokens at 50%" in depth._warnings(weak, {}, "dense")[0]


def test_the_depth_command_prints(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hipserve.cli.options.load_model", lambda *_: loaded)
    line = ["lab", "depth", "--task", "passkey", "--lengths", "260", "--depths", "1"]
    line += ["--samples", "1"]
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 0, shown.stderr
    assert "score by depth" in shown.stdout
    assert "passkey, hip: " in shown.stdout
    report = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert [(c["length"], c["depth"]) for c in report["cells"]] == [(260, 0)]
    assert report["cells"][0]["result"]["scores"]["dense"]["mean"] == 1.0
    refused = CliRunner().invoke(app, ["lab", "depth", "--task", "chains"])
    assert isinstance(refused.exception, ArgumentError)


def test_far_tokens_are_those_that_near_context_does_not_foretell(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A passage at the beginning and again at the end: nothing near foretells its repetition."""
    monkeypatch.setattr(far, "NEAR", 200)
    rng = random.Random(0)
    copied = " ".join(f"{rng.getrandbits(32):08x}" for _ in range(12))
    text = f"{copied}\n\n{TEXT[20000:25000]}\n\n{copied}"
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    first = ids.shape[1] // 2
    loaded.use(None)
    nll = far.read_reference(loaded, ids, first).nll
    mask = far.far_tokens(loaded, ids, first, nll)
    repeated = torch.zeros_like(mask)
    repeated[-len(loaded.tokenizer(copied)["input_ids"]) :] = True
    assert mask.sum() > 20
    assert (mask & repeated).sum() > 0.8 * mask.sum()
    alike = far.read_near(loaded, ids[:, -400:], 200)
    assert alike.shape == (200,)


def test_far_tokens_show_what_blind_attention_loses(loaded: LoadedModel) -> None:
    rng = random.Random(0)
    docs: list[Document] = []
    for i in range(4):
        copied = " ".join(f"{rng.getrandbits(32):08x}" for _ in range(12))
        docs.append(Document(str(i), "docs", f"{copied}\n\n{TEXT[i * 9000 :][:3200]}\n{copied}"))
    length = min(len(loaded.tokenizer(d.text)["input_ids"]) for d in docs)
    report = evaluate_fidelity(
        loaded, {"dense": None, "hip": SMALL}, docs, length=length, margins={"far": 0.05}
    )
    floor, blinded = report.results["noise floor"], report.results["sinks + window"]
    assert floor.far_tokens == blinded.far_tokens > 40
    assert abs(floor.far or 0.0) < 0.05
    assert (blinded.far or 0.0) > 0.5
    assert floor.verdicts["far"].margin == blinded.verdicts["far"].margin == 0.05
    assert blinded.change < (blinded.far or 0.0), "the other tokens dilute it"


def test_student_above_is_the_inverse_of_its_quantile() -> None:
    for freedom in (1, 4, 11, 200, 5000):
        for tail in (0.2, 0.05, 0.01):
            value = student(1 - tail, freedom)
            assert student_above(value, freedom) == pytest.approx(tail, abs=1e-4)
            assert student_above(-value, freedom) == pytest.approx(1 - tail, abs=1e-4)


def test_one_verdict_is_that_of_its_interval() -> None:
    rng = random.Random(1)
    for _ in range(300):
        measured = estimate([rng.gauss(rng.choice((0, 1)), 1.0) for _ in range(12)])
        low, high = measured.interval(0.9) or (0.0, 0.0)
        inside, outside = low > -0.8 and high < 0.8, low > 0.8 or high < -0.8
        expected = "same" if inside else "different" if outside else "undecided"
        assert judge(measured, 0.8).decision == expected


def test_many_verdicts_are_wrong_as_seldom_as_one() -> None:
    """Eight differences exactly at the margin: each alone is called wrongly 5 % of the time."""
    rng, rounds, alone, together = random.Random(2), 300, 0, 0
    for _ in range(rounds):
        measured = [estimate([rng.gauss(1.0, 1.0) for _ in range(10)]) for _ in range(8)]
        alone += any(judge(one, 1.0).decision == "same" for one in measured)
        together += any(verdict.decision == "same" for verdict in judge_all(measured, 1.0))
    assert together / rounds < 0.09
    assert alone / rounds > 0.2


def test_holm_stops_at_the_first_that_holds() -> None:
    def at(value: float) -> Estimate:
        return Estimate(value, 1.0, 2000, 2000.0)

    verdicts = judge_all([at(9.0), at(3.1), at(2.8)], 1.0)
    assert [v.decision for v in verdicts] == ["different", "different", "different"]
    verdicts = judge_all([at(9.0), at(2.9), at(2.8), at(2.7)], 1.0)
    assert [v.decision for v in verdicts] == ["different", "undecided", "undecided", "undecided"]
    assert judge(at(2.8), 1.0).decision == "different"
