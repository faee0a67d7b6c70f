"""`lab budgets`: the best choice there is, errors of real searches, and the command."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hipserve import ArgumentError, ConfigError, FitError, HiPConfig, hip_attention
from hipserve.cli.main import app
from hipserve.lab import Document
from hipserve.lab.budgets.allocate import allocate
from hipserve.lab.budgets.measure import layer_errors, sampled_blocks
from hipserve.lab.budgets.report import UNIT, BudgetReport, find_budgets, measured_factors
from hipserve.lab.budgets.shown import advice, charts, grids
from hipserve.lab.recorder import Call, watched
from hipserve.lab.samples import domain_documents
from hipserve.lab.text import language_reference
from hipserve.models import LoadedModel, bundled_path
from hipserve.models.passes import make_cache, read

SMALL = HiPConfig(
    budget=64, num_sink_tokens=16, sliding_window=32, query_block_size=16, dense_below=0, rerank=8
)
LENGTH = 576
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 8192,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
FULL, WINDOWED = "full_attention", "sliding_attention"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "windows": (
        "Gemma3TextConfig",
        {"sliding_window": 24, "layer_types": [WINDOWED, FULL, WINDOWED]},
    ),
    "softcap": ("Gemma2Config", {"attn_logit_softcapping": 2.0, "layer_types": [FULL] * 3}),
    "only windows": ("MistralConfig", {"sliding_window": 24}),
}


def build(name: str) -> LoadedModel:
    torch.manual_seed(0)
    kind, extra = MODELS[name]
    config = getattr(transformers, kind)(**SIZES, **extra)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # the query heads of the first KV head hardly tell keys apart
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:32] *= 0.1
    return LoadedModel(model, AutoTokenizer.from_pretrained(bundled_path()), name, 4096)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return build("llama")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    text = language_reference()
    return [Document("text", "docs", text[i * 9000 : (i + 1) * 9000]) for i in range(4)]


@pytest.fixture(scope="module")
def report(loaded: LoadedModel, documents: list[Document]) -> BudgetReport:
    return find_budgets(loaded, SMALL, documents, length=LENGTH, blocks=12)


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, 8192, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_total_is_better(seed: int) -> None:
    """Brute force, on tables that need neither fall nor be convex."""
    rng = random.Random(seed)
    heads, costs = rng.randint(1, 4), sorted(rng.sample(range(1, 9), rng.randint(1, 4)))
    errors = [[rng.choice((rng.random(), 0.5)) for _ in costs] for _ in range(heads)]
    if seed % 2:
        errors = [sorted(own, reverse=True) for own in errors]
    total = rng.randint(heads * costs[0], heads * costs[-1] + 2)

    def sums(choice: tuple[int, ...]) -> tuple[float, int]:
        error = sum(own[i] for own, i in zip(errors, choice, strict=True))
        return error, sum(costs[i] for i in choice)

    every = map(sums, itertools.product(range(len(costs)), repeat=heads))
    found, cost = sums(tuple(allocate(torch.tensor(errors, dtype=torch.double), costs, total)))
    assert cost <= total
    assert found == pytest.approx(min(error for error, spent in every if spent <= total))


def test_heads_that_lose_nothing_get_the_least() -> None:
    errors = torch.tensor([[0.0, 0.0, 0.0], [3.0, 2.0, 1.0]])
    assert allocate(errors, [1, 2, 3], 6) == [0, 2]
    with pytest.raises(ArgumentError, match="total: expected 2 or more"):
        allocate(errors, [1, 2, 3], 1)


def test_factors_are_whole_blocks_that_a_search_can_rank() -> None:
    assert measured_factors(HiPConfig()) == [1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 1.5, 2, 3, 4]
    assert measured_factors(SMALL) == [1 / 4, 1 / 2, 3 / 4, 1, 1.5, 2, 3, 4, 6, 8]
    assert measured_factors(HiPConfig(budget=16, rerank=1)) == [1]


def test_query_blocks_are_spread_over_those_that_are_pruned() -> None:
    found = sampled_blocks(SMALL, LENGTH, "cpu", 5)
    assert len(found) == 5
    assert found[-1] == LENGTH - 16
    assert sampled_blocks(SMALL, LENGTH, "cpu", 1000)[0] == found[0] < 16 + 64 + 32 + 2 * 16
    assert sampled_blocks(SMALL.replace(dense_below=512), LENGTH, "cpu") == [512, 528, 544, 560]


@pytest.mark.parametrize("name", ["llama", "windows"])
def test_errors_fall_to_nothing(name: str) -> None:
    """With more keys, and with room for all of them nothing but rounding is left."""
    errors = layer_errors(build(name), tokens(), SMALL, measured_factors(SMALL), blocks=12)
    assert list(errors) == ([1] if name == "windows" else [0, 1, 2])
    for own in errors.values():
        assert own.shape == (2, 10)
        assert (own[:, 0] > 1e-5).all()
        assert (own[:, :-1].sum(0).diff() <= 0).all()
        assert (own[:, -1] < 1e-10).all()


def test_errors_are_those_of_pruned_attention(loaded: LoadedModel) -> None:
    """All query blocks that are pruned; what the others change is nothing but rounding."""
    ids, expected = tokens(), dict[int, Tensor]()

    def prune(call: Call, out: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        first = sampled_blocks(SMALL, LENGTH, "cpu", 1000)[0]
        pruned = hip_attention(q, k, v, config=SMALL, sm_scale=call.scale)
        squares = (pruned - out)[0, first:].double().square().sum((0, 2))
        expected[call.layer] = squares.unflatten(0, (2, 2)).sum(1) / out[0, first:].square().sum()
        return out

    loaded.use(None)
    with torch.no_grad(), watched(loaded, prune):
        list(read(loaded, ids, make_cache(loaded)))
    found = layer_errors(loaded, ids, SMALL, [1.0], blocks=1000)
    for layer, own in expected.items():
        assert torch.allclose(found[layer][:, 0], own, rtol=1e-4)


def test_chunks_change_nothing(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = layer_errors(loaded, tokens(), SMALL, [0.5, 1.0], blocks=12)
    monkeypatch.setattr("hipserve.models.passes.CHUNK", 128)
    parts = layer_errors(loaded, tokens(), SMALL, [0.5, 1.0], blocks=12)
    for layer in whole:
        assert torch.allclose(whole[layer], parts[layer], rtol=1e-3)


def test_budgets_keep_to_the_mean_and_choose_well(report: BudgetReport) -> None:
    factors = [own for of_layer in report.config.budget_factors for own in of_layer]
    assert len(report.config.budget_factors) == 3
    assert len(factors) == 6
    assert sum(factors) <= 6
    assert set(factors) <= set(report.factors)
    assert all((own * UNIT).is_integer() for own in factors)
    assert len(report.choose) == len(report.report) == 2
    assert not set(report.choose) & set(report.report)
    swapped = BudgetReport(**{**fields(report), "report": report.choose})
    assert swapped.left(fitted=True).value < swapped.left().value
    assert report.left(fitted=True).value < report.left().value, "on other documents too"


def fields(report: BudgetReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in BudgetReport.__dataclass_fields__}


def test_the_file_is_the_configuration(report: BudgetReport) -> None:
    for form in ("toml", "json"):
        assert HiPConfig.loads(report.config.dumps(form), form) == report.config
    assert report.config.replace(budget_factors=[]) == SMALL
    assert report.to_dict()["config"]["budget_factors"] == [
        list(own) for own in report.config.budget_factors
    ]


def test_the_same_twice(
    loaded: LoadedModel, documents: list[Document], report: BudgetReport
) -> None:
    config = report.config  # what it was fitted to before does not matter
    again = find_budgets(loaded, config, documents, length=LENGTH, blocks=12)
    assert again == report


def test_layers_that_nothing_prunes_have_no_factors(documents: list[Document]) -> None:
    found = find_budgets(build("windows"), SMALL, documents, length=LENGTH, count=2, blocks=4)
    assert [len(own) for own in found.config.budget_factors] == [0, 2, 0]
    dense = SMALL.replace(dense_layers=[0, 2])
    found = find_budgets(build("llama"), dense, documents, length=LENGTH, count=2, blocks=4)
    assert [len(own) for own in found.config.budget_factors] == [0, 2, 0]
    assert found.layers == [1]


def test_tables_charts_and_advice(report: BudgetReport) -> None:
    (grid,) = grids(report)
    assert grid.headings[0] == "layer"
    assert grid.rows[0][1:3] == [f"{keys:,}" for keys in report.keys(0)]
    assert grid.rows[-1][0] == "mean"
    assert grid.rows[-1][3].startswith(f"{report.left().value:.4f}")
    assert len(charts(report)[0].lines[0].x) == 6
    assert "`--config mine.toml`" in advice(report, Path("mine.toml"))
    level = HiPConfig(**{**SMALL.to_dict(), "budget_factors": [[1.0, 1.0]] * 3})
    assert "gain nothing" in advice(BudgetReport(**{**fields(report), "config": level}), None)


def test_what_cannot_be_measured_is_refused(loaded: LoadedModel, documents: list[Document]) -> None:
    with pytest.raises(FitError, match="nothing to measure in 4,000 tokens"):
        find_budgets(loaded, SMALL, documents, length=4000)
    with pytest.raises(FitError, match="does not fit llama"):
        find_budgets(loaded, SMALL, documents, length=5000)
    with pytest.raises(FitError, match="one document of 576 tokens or more"):
        find_budgets(loaded, SMALL, documents[:1], length=LENGTH)
    with pytest.raises(FitError, match="nothing to prune in 128 tokens"):
        find_budgets(loaded, SMALL, documents, length=128)
    with pytest.raises(FitError, match="no layer that reads everything"):
        find_budgets(build("only windows"), SMALL, documents, length=LENGTH)
    with pytest.raises(FitError, match="softcap has dense attention of its own"):
        find_budgets(build("softcap"), SMALL, documents, length=LENGTH)
    with pytest.raises(ConfigError, match="budget_factors"):
        find_budgets(loaded, SMALL.replace(rerank=0), documents, length=LENGTH)


def test_the_command_writes_what_runs_and_what_calibrates(tmp_path: Path) -> None:
    texts = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, text in enumerate(texts):
        text.write_text(domain_documents(9000)[1].text[9000 * i : 9000 * (i + 1)])
    named = [word for text in texts for word in ("--text", str(text))]
    base = tmp_path / "base.toml"
    base.write_text(SMALL.dumps())

    def invoke(words: str) -> Any:
        return CliRunner().invoke(app, [*words.split(), *named, "--length", "640"])

    out = tmp_path / "hip.toml"
    words = f"lab budgets --config {base} --documents 2 --device cpu"
    done = invoke(f"{words} --out {out} --json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    config = HiPConfig.load(out)
    assert config.to_dict() == values["config"]
    assert [len(own) for own in config.budget_factors] == [2] * 12
    assert values["left"]["fitted"]["value"] > 0
    shown = invoke(words)
    assert shown.exit_code == 0, shown.output
    line = next(x for x in shown.stdout.splitlines() if x.startswith("budget_factors = "))
    assert line in out.read_text()
    nowhere = invoke(f"{words} --out {base / 'hip.toml'}")
    assert isinstance(nowhere.exception, ArgumentError)
    asked = invoke(f"calibrate --config {out} --json --max-loss 90%")
    assert asked.exit_code in (0, 5), asked.output
    assert json.loads(asked.stdout)["keys"]
