"""`lab quality` measures what it says, tells noise from loss, and catches blind attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config
from typer.testing import CliRunner

from hipserve import ArgumentError, HiPConfig
from hipserve.cli.main import app
from hipserve.lab import Document, FidelityReport, evaluate_fidelity
from hipserve.lab.quality import fidelity, passes
from hipserve.lab.quality.beside import read_beside, read_reference
from hipserve.lab.quality.controls import everything
from hipserve.lab.quality.costs import frontier
from hipserve.lab.quality.shown import charts, costs_grid, pareto
from hipserve.lab.text import language_reference
from hipserve.models import LoadedModel, bundled_path, load

SMALL = HiPConfig(
    budget=64, num_sink_tokens=16, sliding_window=64, query_block_size=16, dense_below=0
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def shipped() -> LoadedModel:
    """In the type of its weights, with the noise of bfloat16."""
    return load(device="cpu")


@pytest.fixture(scope="module")
def capped() -> LoadedModel:
    """A model that changes its logits behind the head, as Gemma 2 does."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8192}
    config = Gemma2Config(
        **sizes,
        **heads,
        final_logit_softcapping=0.5,
        attn_logit_softcapping=None,
        initializer_range=0.5,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    return LoadedModel(model, AutoTokenizer.from_pretrained(bundled_path()), "capped", 4096)


def documents(count: int, size: int = 9000) -> list[Document]:
    text = language_reference()
    step = (len(text) - size) // count
    parts = [text[i * step : i * step + size] for i in range(count)]
    return [Document(f"part {i}", "docs" if i % 2 else "more", t) for i, t in enumerate(parts)]


@torch.no_grad()
def whole_logits(loaded: LoadedModel, ids: torch.Tensor, config: HiPConfig | None) -> torch.Tensor:
    loaded.use(config)
    return loaded.model(ids, use_cache=False).logits[0].double()


@pytest.mark.parametrize("name", ["loaded", "capped"])
def test_tokens_are_those_of_whole_logits(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk, against both logits of the whole text at once."""
    model: LoadedModel = request.getfixturevalue(name)
    ids = torch.randint(3, 8192, (1, 600), generator=torch.Generator().manual_seed(1))
    log_p = whole_logits(model, ids, None).log_softmax(-1)
    log_q = whole_logits(model, ids, SMALL).log_softmax(-1)
    monkeypatch.setattr(passes, "LOGITS_BYTES", 256 * 4 * 8192)
    monkeypatch.setattr("hipserve.models.passes.CHUNK", 256)
    rows: list[int] = []
    hook = model.model.lm_head.register_forward_hook(lambda *io: rows.append(io[2].shape[1]))
    model.use(None)
    reference = read_reference(model, ids, 300)
    model.use(SMALL)
    tokens = read_beside(model, ids, 300, reference)
    hook.remove()
    assert max(rows) == 256, "the logits of a chunk keep to their bound"
    assert sum(rows) == 1 + 301 + 1 + 2 * 301, "one row of what comes before, then both of each"
    targets = ids[0, 300:, None]
    p, q = log_p[299:-1], log_q[299:-1]
    close: Any = {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(reference.nll.double(), -p.gather(1, targets)[:, 0], **close)
    torch.testing.assert_close(tokens.nll.double(), -q.gather(1, targets)[:, 0], **close)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert divergence.mean() > 1e-3
    torch.testing.assert_close(tokens.kl.double(), divergence, atol=1e-4, rtol=1e-2)
    same = p.argmax(-1) == q.argmax(-1)
    assert 0 < same.double().mean() < 1
    assert (tokens.same == same).double().mean() > 0.99, "but for ties"


@pytest.fixture(scope="module")
def report(shipped: LoadedModel) -> FidelityReport:
    configs = {"dense": None, "hip": SMALL}
    return evaluate_fidelity(shipped, configs, documents(5), length=700, first=350)


def test_the_floor_is_the_same_and_blind_attention_is_caught(report: FidelityReport) -> None:
    assert list(report.results) == ["dense", "noise floor", "hip", "sinks + window"]
    dense, floor, hip, blind = report.results.values()
    assert (dense.change, dense.kl, dense.same_top, dense.verdicts) == (0, 0, 1, {})
    assert floor.decision == "same"
    assert floor.kl < 1e-3 < hip.kl < blind.kl
    assert floor.same_top > hip.same_top > blind.same_top
    assert blind.decision == "different"
    assert blind.verdicts["kl"].decision == "different"
    assert blind.change > 0
    assert blind.kl_p99 > 3 * blind.kl > 0
    assert not any("caught" in warning for warning in report.warnings)
    assert not any("itself" in warning for warning in report.warnings)


def test_dense_attention_by_the_kernels_that_serve(
    shipped: LoadedModel, report: FidelityReport
) -> None:
    """SDPA is its noise floor then, of as many documents as are asked for."""
    configs = {"dense": everything(SMALL), "hip": SMALL}
    own = evaluate_fidelity(
        shipped, configs, documents(5), length=700, first=350, floor_documents=4
    )
    assert own.configs["noise floor"] == {}
    floor, hip = own.results["noise floor"], own.results["hip"]
    assert floor.decision == "same"
    assert floor.kl < 1e-3
    assert (floor.pieces, hip.pieces) == (4, 5)
    assert hip.kl == pytest.approx(report.results["hip"].kl, rel=0.02)
    assert "noise floor: of 4 of 5 documents, intervals over documents" in " ".join(own.warnings)


def test_intervals_rest_on_documents(report: FidelityReport) -> None:
    hip = report.results["hip"]
    assert (report.unit, hip.pieces) == ("documents", 5)
    for value, interval in (
        (hip.change, hip.interval),
        (hip.kl, hip.kl_interval),
        (hip.same_top, hip.same_top_interval),
    ):
        assert interval is not None
        assert interval[0] < value < interval[1]
    assert report.configs["sinks + window"]["budget"] == 16
    assert json.loads(json.dumps(report.to_dict()))["results"]["hip"]["verdicts"]["kl"]["margin"]


def test_the_pareto_set_by_hand() -> None:
    costs, losses = (
        {"a": 1, "b": 2, "c": 2, "d": 3, "e": 3},
        {"a": 9, "b": 5, "c": 6, "d": 5, "e": 1},
    )
    assert frontier(list(costs), costs.__getitem__, losses.__getitem__) == ["a", "b", "e"]
    assert frontier(["b", "b2"], lambda _: 1, lambda _: 1) == ["b", "b2"], "equals stay"


def test_costs_and_the_pareto_set_of_budgets(capped: LoadedModel) -> None:
    """More budget reads more and loses less; a worse search for as many keys is not in the set."""
    budgets = {f"{b}": SMALL.replace(budget=b) for b in (32, 64, 128)}
    configs = {
        "dense": None,
        **budgets,
        "worse": SMALL.replace(budget=128, bound_reach=0, rerank=0),
    }
    found = evaluate_fidelity(capped, configs, documents(2), length=600)
    assert found.judged() == ["32", "64", "128", "worse"]
    assert set(found.costs) == {"noise floor", "sinks + window", *found.judged()}
    assert found.costs["noise floor"].share == 1
    shares = [found.costs[name].share for name in found.judged()]
    assert 0.1 < shares[0] < shares[1] < shares[2] < 1
    assert shares[3] == pytest.approx(shares[2], rel=0.05)
    assert all(cost.texts == 2 and cost.seconds > 0 for cost in found.costs.values())
    best = pareto(found, "keys read, %")
    assert best[:2] == ["32", "64"]
    rows = costs_grid(found).rows
    assert [row[2] for row in rows] == [
        f"{100 * share:.1f}" + " *" * (name in best)
        for name, share in zip(found.judged(), shares, strict=True)
    ]
    changes, by_keys, by_seconds = charts(found)
    assert (by_keys.x, by_seconds.x) == ("keys read, %", "seconds a text")
    joined, *dots = by_keys.lines
    assert list(joined.x) == sorted(100 * found.costs[name].share for name in best)
    assert [line.label for line in dots] == [line.label for line in changes.lines]


def test_one_pass_of_every_attention(capped: LoadedModel) -> None:
    """However many are varied, dense attention reads a document once."""
    read: list[tuple[str, int]] = []

    def note(module: Any, inputs: Any) -> None:
        config = capped.model.config
        name = str(config.hip["budget"]) if config.hip else "dense"
        read.append((name, inputs[0].shape[1]))

    hook = capped.model.model.embed_tokens.register_forward_pre_hook(note)
    configs = {"dense": None} | {f"{b}": SMALL.replace(budget=b) for b in (32, 64, 128)}
    evaluate_fidelity(capped, configs, documents(1), length=600, far=False)
    hook.remove()
    tokens = {name: sum(n for at, n in read if at == name) for name in dict(read)}
    assert tokens == {"dense": 600, "32": 1200, "64": 600, "128": 600, "16": 600}, "32: floor, own"


def test_warnings_say_what_numbers_cannot(capped: LoadedModel) -> None:
    roomy = SMALL.replace(budget=1024)
    configs = {"dense": None, "hip": roomy, "x": roomy, "y": roomy}
    margins = {"kl": 50.0}
    one = evaluate_fidelity(capped, configs, documents(1), length=1200, margins=margins)
    found = " / ".join(one.warnings)
    assert one.unit == "pieces of 1,024 tokens"
    assert one.results["hip"].interval is None
    assert one.results["hip"].verdicts["kl"].more == 3
    assert "sinks + window was not caught" in found
    assert "for these texts only" in found
    assert "corrected for 3 configurations (Holm)" in found


def test_likelier_than_dense_is_a_warning() -> None:
    """A planted gain: every token of every document finds its successor more likely."""
    units = fidelity._Units.of(documents(4, 1), 10)
    base = [fidelity.Tokens(torch.full((10,), 2.0), torch.zeros(10), torch.ones(10).bool())] * 4
    noise = torch.linspace(0.97, 0.99, 4)
    better = [base[0]._replace(nll=base[0].nll * x) for x in noise]
    measured = {
        "dense": fidelity._Measured.of(base, base, units),
        "hip": fidelity._Measured.of(base, better, units),
    }
    verdicts = fidelity._judge(measured, "dense", {"likelihood": 0.005, "kl": 0.05})
    results = {name: row.summary(verdicts[name]) for name, row in measured.items()}
    (warning,) = fidelity._warnings(results, "dense", units)
    assert "hip: likelier than dense" in warning
    assert results["hip"].verdicts["likelihood"].decision == "different"


def test_blind_attention_is_caught_by_the_tokens_that_need_far_context() -> None:
    """A loss that differs too much between documents for a verdict, on few tokens of each."""
    units = fidelity._Units.of(documents(4, 1), 10)
    base = fidelity.Tokens(torch.ones(10), torch.zeros(10), torch.ones(10).bool())
    needs_far = torch.arange(10) < 2
    lost = [
        base._replace(nll=1 + needs_far * 4 + size, kl=torch.full((10,), size))
        for size in (0.0, 0.0, 0.0, 3.0)
    ]
    found: dict[str, list[str]] = {}
    for name, masks in (("far", [needs_far] * 4), ("no far", [])):
        measured = fidelity._Measured.of([base] * 4, lost, units, masks)
        margins = {"likelihood": 0.005, "kl": 0.05}
        verdicts = fidelity._judge({"sinks + window": measured}, "dense", margins)
        row = measured.summary(verdicts["sinks + window"])
        assert row.verdicts["kl"].decision == "undecided"
        found[name] = fidelity._warnings({"sinks + window": row}, "dense", units)
    assert found["far"] == []
    assert "was not caught" in found["no far"][0]


def test_domains_count_alike() -> None:
    docs = [Document(str(i), "a" if i else "b", "") for i in range(5)]
    units = fidelity._Units.of(docs, 10)
    tokens = [
        fidelity.Tokens(torch.full((10,), x), torch.full((10,), x), torch.ones(10).bool())
        for x in (5.0, 1.0, 1.0, 2.0, 2.0)
    ]
    row = fidelity._Measured.of(tokens, tokens, units).summary({})
    assert row.by_domain == {"b": 5.0, "a": 1.5}
    assert row.mean == row.kl == pytest.approx(3.25)


@pytest.mark.parametrize("margins", [{"perplexity": 0.1}, {"kl": 0.0}, {"kl": float("nan")}])
def test_margins_that_are_none(capped: LoadedModel, margins: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="margin: expected"):
        evaluate_fidelity(capped, {"dense": None}, documents(1), length=600, margins=margins)


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["lab", "quality", *words])


def test_the_command_prints_and_chooses(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"title": d.name, "text": d.text}) for d in documents(4)))
    words = ["--text", str(texts), "--length", "300", "--documents", "1::2", "--device", "cpu"]
    shown = invoke(*words, "--margin", "kl=20%", "--margin", "top1=50%")
    assert shown.exit_code == 0, shown.stderr
    assert "sinks + window: likelihood" in shown.stdout
    assert "kl same (margin 0.2)" in shown.stdout or "kl undecided (margin 0.2" in shown.stdout
    assert "nothing was pruned" in shown.stderr
    assert "Pareto" not in shown.stdout, "a single attention has no other to be compared with"
    picture = tmp_path / "curve.svg"
    several = invoke(*words, "--vary", "budget=128,2k", "--svg", str(picture))
    assert "* in the Pareto set" in " ".join(several.stdout.split())
    assert "keys read, %" in picture.read_text("utf-8")
    result = json.loads(invoke(*words, "--dense", "hip", "--json").stdout)
    assert result["documents"] == ["part 1", "part 3"]
    assert result["configs"]["dense"]["dense_below"] > 1 << 20
    assert result["configs"]["noise floor"] == {}
    assert "dense: nothing was pruned" not in shown.stderr
    assert "--dense: expected sdpa or hip" in str(invoke(*words, "--dense", "flash").exception)
    assert result["margins"] == {"likelihood": 0.005, "kl": 0.05}


def test_tasks_stand_beside_the_text(
    capped: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that knows nothing answers nothing right, but gives every answer some probability."""
    monkeypatch.setattr("hipserve.cli.options.load_model", lambda *_: capped)
    settings, text = tmp_path / "small.toml", tmp_path / "text.txt"
    settings.write_text(SMALL.dumps())
    text.write_text(language_reference()[:9000])
    words = ["--length", "500", "--samples", "4", "--questions", "2", "--tasks", "niah"]
    words += ["--config", str(settings), "--form", "continuation", "--text", str(text)]
    shown = invoke(*words, "--json")
    assert shown.exit_code == 0, shown.stderr
    (task,) = json.loads(shown.stdout)["tasks"]["results"]
    assert list(task["scores"]) == ["dense", "noise floor", "hip", "sinks + window"]
    assert task["samples"] == 8
    floor, hip, _ = task["flips"].values()
    assert abs(floor["nats"]) < 1e-3 < abs(hip["nats"])
    low, high = hip["nats_interval"]
    assert low < hip["nats"] < high
    assert hip["verdict"]["decision"] == "undecided"
    assert "leaves little to lose" in shown.stderr
    assert "niah: sinks + window was not caught" in shown.stderr
    words[words.index("--samples") + 1] = "1"
    table = invoke(*words).stdout
    assert "niah, hip: answers undecided (margin 0.02: " in table
    assert "gained" in table


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--margin", "kl"], "expected MEASURE=SIZE, got 'kl'"),
        (["--margin", "likelyhood=1%"], "margin: expected one of likelihood"),
        (["--documents", "5"], "--documents: expected a slice that leaves some of 1 text"),
        (["--documents", "1::"], "documents: expected a slice"),
        (["--tasks", "niah,pi"], "--tasks: expected one of passkey"),
        (["--form", "poem"], "form: expected chat or continuation"),
    ],
)
def test_mistakes_are_named(words: list[str], part: str) -> None:
    refused = invoke(*words)
    assert isinstance(refused.exception, ArgumentError)
    assert part in str(refused.exception)
