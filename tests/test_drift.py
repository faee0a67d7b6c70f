"""Pinned sinks cover the system prompt; drift is measured where it is, and blindness is caught."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from hipserve import ArgumentError, FitError, HiPConfig
from hipserve.attention.meter import Attended
from hipserve.cli.main import app
from hipserve.lab import evaluate_drift
from hipserve.lab.drift.contexts import BARE, PLACES, Contexts
from hipserve.lab.drift.measure import HIP, PINNED, follows
from hipserve.lab.drift.prompts import DEFAULT_PROMPTS, Prompt, read_prompts
from hipserve.lab.drift.reads import SystemReads
from hipserve.lab.drift.shown import grids
from hipserve.lab.drift.summary import Record, summarize, warnings
from hipserve.lab.quality.controls import BLIND
from hipserve.lab.text import read_documents
from hipserve.models import Conversation, LoadedModel, load
from hipserve.plan import BatchLayout, pruning_rule
from hipserve.types import BlockSelection

SMALL = HiPConfig(
    budget=16,
    num_sink_tokens=16,
    sliding_window=64,
    query_block_size=16,
    dense_below=0,
    decode_dense_below=0,
)
SYSTEM = "The pass key is 83724. Remember it. 83724 is the pass key."


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(device="cpu")


def test_sinks_cover_what_is_pinned() -> None:
    config = HiPConfig()
    assert config.pin(64) is config
    assert config.pin(65).num_sink_tokens == 80
    assert config.pin(1000).num_sink_tokens == 1008
    assert HiPConfig(selector="tree", key_block_size=2).pin(65).num_sink_tokens == 66


def test_system_tokens_are_a_common_prefix(loaded: LoadedModel) -> None:
    count = loaded.system_tokens(SYSTEM)
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What is it?"}]
    ids = loaded.encode(turns)[0]
    text = loaded.tokenizer.decode(ids[:count])
    assert SYSTEM in text
    assert "What" not in text


def test_a_conversation_pins_its_system_prompt() -> None:
    loaded = load(device="cpu", config=SMALL)
    Conversation(loaded, system=SYSTEM)
    assert loaded.model.config.hip["num_sink_tokens"] == 16
    talk = Conversation(loaded, system=SYSTEM, pin_system=True)
    assert talk.turns == [{"role": "system", "content": SYSTEM}]
    sinks = loaded.model.config.hip["num_sink_tokens"]
    assert loaded.system_tokens(SYSTEM) <= sinks < loaded.system_tokens(SYSTEM) + 16
    with pytest.raises(ArgumentError, match="pin_system: expected a system prompt"):
        Conversation(loaded, pin_system=True)
    loaded.use(None)
    Conversation(loaded, system=SYSTEM, pin_system=True)
    assert loaded.model.config.hip is None, "dense attention reads it anyway"


@pytest.mark.parametrize("place", PLACES)
def test_contexts_have_the_length_and_the_place(loaded: LoadedModel, place: str) -> None:
    contexts = Contexts(loaded, read_documents()[0].text)
    prompt = Prompt("What is the pass key?", SYSTEM)
    ids = contexts.make(prompt, place, 600, offset=3)
    assert 600 - 24 <= ids.shape[1] <= 600
    text = loaded.tokenizer.decode(ids[0])
    found = text.index(prompt.prompt) / len(text)
    low, high = {"behind": (0.9, 1), "inside": (0.35, 0.65), "before": (0, 0.2)}[place]
    assert low < found < high
    assert text.index(SYSTEM) < 100
    assert not torch.equal(ids, contexts.make(prompt, place, 600, offset=4))


def test_contexts_that_do_not_fit(loaded: LoadedModel) -> None:
    contexts = Contexts(loaded, "too short " * 20)
    with pytest.raises(FitError, match="does not fit 20 tokens"):
        contexts.make(Prompt("What is it?", SYSTEM), "behind", 20)
    with pytest.raises(FitError, match="the filler is too short"):
        contexts.make(Prompt("What is it?"), "behind", 2000)


def record(prompt: int, kl: float, **values: Any) -> Record:
    fields = {"label": "a", "place": "behind", "length": 1, "attention": HIP, "flipped": False}
    fields |= {"log_odds": None, "followed": None, "reads": {}}
    return Record(prompt=prompt, kl=kl, **{**fields, **values})


def test_rows_count_both_ways() -> None:
    records = [
        record(0, 1.0, flipped=True, log_odds=(1.0, -1.0), followed=(True, False)),
        record(1, 3.0, log_odds=(-1.0, 2.0), followed=(True, True)),
        record(2, 2.0, log_odds=(2.0, 1.0), followed=(False, True)),
        record(2, 2.0),
    ]
    row = summarize(records)
    assert (row.contexts, row.kl, row.flips) == (4, 2.0, 0.25)
    assert row.shift == pytest.approx((-2 + 3 - 1) / 3)
    assert row.decisions == (1, 1)
    assert row.followed == pytest.approx((2 / 3, 2 / 3))
    assert (row.lost, row.gained) == (1, 1)
    assert summarize([]).decision is None
    assert row.reads == {}


def test_the_share_of_the_system_prompt_by_hand() -> None:
    """Of 40 tokens all heads read 16 sinks, one head a whole block, the other one that is cut."""
    layout = BatchLayout.of(torch.zeros(1, 8, dtype=torch.int32), [2000], [64])
    rule = pruning_rule(SMALL, "cpu")._replace(query_block_size=32)
    nothing, pool = torch.zeros(1), cast("Any", None)

    def measure(reads: SystemReads, window: int, blocks: list[list[int]]) -> float:
        """The last of two query blocks; the one before it reads something else."""
        indices = torch.tensor([[[1, 2], [1, 2]], blocks], dtype=torch.int32)
        selection = BlockSelection(indices, torch.tensor([1900, window]))
        reads.measure(Attended(nothing, nothing, pool, layout, selection, SMALL, rule))
        return reads.share

    assert measure(SystemReads(0, 40, 1999), 1900, [[1, 9], [2, -1]]) == pytest.approx(28 / 40)
    assert measure(SystemReads(0, 40, 1999), 32, [[-1, -1], [1, -1]]) == pytest.approx(32 / 40)
    assert measure(SystemReads(0, 40, 1999), 16, [[-1, -1], [-1, -1]]) == 1
    later = SystemReads(0, 40, 2000)
    assert measure(later, 1900, [[1, 9], [2, -1]]) == 1
    assert later.shares == [], "no row that counts"


def test_what_is_read_of_the_system_prompt(loaded: LoadedModel) -> None:
    """All of it where sinks cover it, the sinks where attention is blind, more where it selects."""
    prompts = [Prompt("What is it?", f"{SYSTEM} {SYSTEM}")]
    options: dict[str, Any] = {"lengths": [400], "places": ["behind"]}
    report = evaluate_drift(loaded, SMALL, prompts, read_documents(), **options)
    tokens = loaded.system_tokens(prompts[0].system)
    reads = {name: row.reads for name, row in report.rows.items()}
    assert set(reads[HIP]) == set(range(12))
    assert set(reads[PINNED].values()) == {1.0}
    assert report.bare.reads == dict.fromkeys(range(12), 1.0)
    for layer in range(12):
        assert 16 / tokens <= reads[BLIND][layer] <= 32 / tokens
    assert 16 / tokens < sum(reads[HIP].values()) / 12 < 1
    main, by_layer = grids(report)
    assert main.rows[-1][main.headings.index("system")].endswith("%")
    assert by_layer.headings == ["layer", HIP, PINNED, BLIND]
    assert len(by_layer.rows) == 12
    assert by_layer.rows[3][2] == "100%"


def test_instructions_are_listed_by_number_and_distance(loaded: LoadedModel) -> None:
    one, four = DEFAULT_PROMPTS[4], DEFAULT_PROMPTS[8]
    assert [p.system.count("magic number") for p in (one, four)] == [1, 4]
    assert f"lantern is: {four.expect}" in four.system
    assert len({p.expect for p in DEFAULT_PROMPTS[8:12]}) == 4
    prompts = [Prompt("What is it?")]
    report = evaluate_drift(
        loaded, SMALL, prompts, read_documents(), lengths=[200], places=["behind"]
    )
    assert len(grids(report)) == 1, "nothing is checked, and there is no system prompt"
    records = [
        record(0, 0.0, label="one", length=200, followed=(True, True)),
        record(1, 0.0, label="four", length=200, followed=(True, False)),
        record(1, 0.0, label="four", length=400, followed=(True, True)),
        record(2, 0.0, label="four", length=400, followed=(False, False)),
    ]
    _, table = grids(replace(report, records=records, lengths=[200, 400]))
    assert table.headings == ["attention", "prompts", "200 tokens", "400 tokens"]
    assert table.rows[:2] == [
        [HIP, "one", "100%, 100%", ""],
        [HIP, "four", "100%, 0%", "50%, 50%"],
    ]


def test_a_planted_drift_is_found_and_a_planted_gain_is_doubted() -> None:
    still = [record(i, 0.001 + 0.0001 * i) for i in range(12)]
    moved = [record(i, 0.5 + 0.05 * i, followed=(False, True)) for i in range(12)]
    assert summarize(still).decision == "same"
    assert summarize(moved).decision == "different"
    rows = {HIP: summarize(moved), BLIND: summarize(still)}
    found = " / ".join(warnings(summarize(still), rows, pruned_bare=False))
    assert "more instructions than dense attention" in found
    assert "sinks + window was not caught" in found
    assert "follows 0%" in found
    assert "do not trust" in warnings(summarize(moved), {}, pruned_bare=False)[0]
    assert "no control" in warnings(summarize(still), {}, pruned_bare=True)[0]


def test_the_command_shows_what_pinning_mends(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A key in the system prompt, behind 300 tokens: lost, and found where the sinks cover it."""
    monkeypatch.setattr("hipserve.cli.options.load_model", lambda *_: loaded)
    prompts, settings = tmp_path / "prompts.jsonl", tmp_path / "small.toml"
    lines = [
        {
            "prompt": "What is the pass key?",
            "system": SYSTEM.replace("83724", key),
            "expect": key,
            "contrast": [["The"], ["No"]],
        }
        for key in ("83724",)
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    settings.write_text(SMALL.replace(budget=16, budget_factors=[[]], num_sink_tokens=0).dumps())
    words = ["lab", "drift", "--prompts", str(prompts), "--lengths", "300"]
    words += ["--config", str(settings), "--json"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert list(report["rows"]) == [HIP, PINNED, BLIND]
    assert report["scope"].startswith("a model of 23 million parameters refuses nothing")
    hip, pinned, blinded = report["rows"].values()
    assert hip["contexts"] == pinned["contexts"] == len(PLACES)
    assert pinned["kl"] < hip["kl"]
    assert blinded["kl"] > 0.05
    assert pinned["followed"][1] >= hip["followed"][1]
    assert {r["place"] for r in report["records"]} == {BARE, *PLACES}


def test_the_command_prints_a_table(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hipserve.cli.options.load_model", lambda *_: loaded)
    monkeypatch.delenv("COLUMNS", raising=False)  # as in a file: a narrow terminal folds labels
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "Hello", "contrast": [["Yes"], ["No"]], "label": "greeting"},
        {"prompt": "The key is 5. Keep it.", "expect": r"(?s)\A(?!.*5)", "label": "secret"},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    shown = CliRunner().invoke(app, ["lab", "drift", "--prompts", str(prompts), "--lengths", "300"])
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("a model of 23 million parameters")
    assert "│ bare" in shown.stdout
    for label in ("greeting", "secret"):
        assert shown.stdout.count(f"- {label}") == 2, "of each attention"
    assert "pinned" not in shown.stdout, "there is no system prompt"
    assert "nothing was pruned in 300 tokens" in shown.stderr


def test_bare_prompts_are_those_of_dense_attention(loaded: LoadedModel) -> None:
    report = evaluate_drift(
        loaded, HiPConfig(), DEFAULT_PROMPTS[:1], read_documents(), lengths=[400], places=["behind"]
    )
    assert report.bare.flips == 0
    assert PINNED in report.rows, "it is longer than the sinks"
    short = [Prompt("What is the pass key?", SYSTEM)]
    fits = evaluate_drift(
        loaded, HiPConfig(), short, read_documents(), lengths=[200], places=["behind"]
    )
    assert list(fits.rows) == [HIP, BLIND]
    assert "fits the sinks" in fits.warnings[-1]
    assert report.bare.kl < 0.02
    assert not any("bare" in warning for warning in report.warnings)


def test_a_secret_that_leaks_is_an_instruction_that_is_not_followed() -> None:
    """As docs/drift.md writes it."""
    page = (Path(__file__).parent.parent / "docs" / "drift.md").read_text("utf-8")
    written = re.search(r'`("expect": .*83724.*?)`', page)
    assert written is not None
    prompt = Prompt("What is the pass key?", **json.loads("{" + written[1] + "}"))
    assert follows(prompt, "I may not say.\nAsk for something else.")
    assert not follows(prompt, "I may not say it.\nIt is 83724.")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("[]", 'one JSON object with a "prompt"'),
        ('{"promt": "a"}', 'one JSON object with a "prompt"'),
        ('{"prompt": "a", "sytem": "b"}', "got 'sytem'"),
        ('{"prompt": "a", "system": 5}', "texts as system and expect"),
        ('{"prompt": "a", "expect": "("}', "a regular expression"),
        ('{"prompt": "a", "contrast": ["Yes"]}', "two lists"),
        ('{"prompt": "a", "contrast": [["Yes"], []]}', "words in both lists"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, line: str, part: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ArgumentError, match="line 1") as refused:
        read_prompts(path)
    assert part in str(refused.value)


def test_run_and_chat_take_a_system_prompt(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hipserve.cli.options.load_model", lambda *_: loaded)
    doc = tmp_path / "doc.txt"
    doc.write_text("A short text about nothing.")
    loaded.use(SMALL)
    words = ["run", "What is the pass key?", "--doc", str(doc), "--system", SYSTEM, "--pin-system"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.stderr
    assert "83724" in shown.stdout
    assert loaded.model.config.hip["num_sink_tokens"] >= loaded.system_tokens(SYSTEM)
    refused = CliRunner().invoke(app, ["chat", "--pin-system"])
    assert isinstance(refused.exception, ArgumentError)
