"""`lab locality`: measures by hand and by law, intervals that cover, and heads pruned alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from hipserve import FitError, HiPConfig
from hipserve.cli.main import app
from hipserve.lab.locality.clusters import intraclass, unread, waste
from hipserve.lab.locality.loss import head_losses
from hipserve.lab.locality.ranks import rank_correlation
from hipserve.lab.locality.report import PREDICTORS, LocalityReport, measure_locality
from hipserve.lab.locality.shown import charts, grids
from hipserve.lab.samples import PIECE, cut_samples, domain_documents, locality_documents
from hipserve.models import LoadedModel, bundled_path

SMALL = HiPConfig(
    budget=64, num_sink_tokens=16, sliding_window=64, query_block_size=16, dense_below=0
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A random model of three layers with two KV heads each."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.5)
    model = AutoModelForCausalLM.from_config(config).eval()
    return LoadedModel(model, AutoTokenizer.from_pretrained(bundled_path()), "tiny", 4096)


def noise(rows: int, keys: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(rows, keys, generator=torch.Generator().manual_seed(seed))


def test_independent_scores_have_no_locality() -> None:
    scores = noise(50, 4096)
    for size in (16, 64):
        assert intraclass(scores, size) == pytest.approx(1 / size, rel=0.1)
    assert waste(4 * scores, 16) > 4


def test_scores_alike_in_each_block_are_all_locality() -> None:
    scores = noise(50, 256).repeat_interleave(16, dim=1)
    assert intraclass(scores, 16) == pytest.approx(1)
    assert intraclass(scores, 64) == pytest.approx(1 / 4, rel=0.15)
    assert 1 <= waste(4 * scores, 16) < 1.1, "but for the last block of each row"


def test_intraclass_share_of_a_mixture() -> None:
    """Variance 3 between blocks and 1 inside: (3 + 1/16) / 4 lies between means."""
    scores = 3**0.5 * noise(80, 256, 3).repeat_interleave(16, dim=1) + noise(80, 4096)
    assert intraclass(scores, 16) == pytest.approx((3 + 1 / 16) / 4, abs=0.02)


def test_waste_by_hand() -> None:
    """Two keys hold nearly everything: in one block of four, or in one block each."""
    scores = torch.full((2, 16), -20.0)
    scores[0, [0, 1]] = scores[1, [0, 5]] = 5.0
    assert waste(scores[:1], 4) == 4 / 2
    assert waste(scores[1:], 4) == 8 / 2


def test_unread_by_hand() -> None:
    """Masses of 8 keys: 1/16, searched [3 2 | 1 1 | 4 1], 3/16; one block of two is read."""
    masses = torch.tensor([[1.0, 0, 3, 2, 1, 1, 4, 1, 2, 1]])
    found = unread(masses.log(), torch.tensor(2), torch.tensor([8]), 2, 1)
    assert found == pytest.approx(7 / 16)
    assert unread(masses.log(), torch.tensor(2), torch.tensor([8]), 2, 3) == pytest.approx(0)


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3, 4, 5], [10, 20, 30, 40, 500]).value == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]).value == pytest.approx(-1)
    tied = rank_correlation([1, 1, 2, 3], [1, 2, 3, 4])
    assert tied.value == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert tied.interval is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]).value == 0


@pytest.mark.parametrize("strength", [0.0, 0.6, 0.9])
def test_intervals_of_rank_correlation_cover(strength: float) -> None:
    """Spearman's correlation of Gaussian pairs is 6/pi arcsin(strength / 2)."""
    truth = 6 / torch.pi * torch.asin(torch.tensor(strength / 2)).item()
    covered, trials = 0, 400
    pairs = noise(2 * trials, 24, 5)
    for i in range(trials):
        x, fresh = pairs[2 * i], pairs[2 * i + 1]
        y = strength * x + (1 - strength**2) ** 0.5 * fresh
        interval = rank_correlation(x.tolist(), y.tolist()).interval
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert 0.92 <= covered / trials <= 0.985


def test_a_head_pruned_alone_loses_its_own(loaded: LoadedModel) -> None:
    """Nothing where the budget holds everything; less than all heads together lose; and the other
    heads and layers stay as they are."""
    ids = cut_samples(loaded, domain_documents(6000)[:1], 640, 1)[0].ids
    heads = [(0, 1), (2, 0)]
    whole = head_losses(loaded, ids, heads, SMALL.replace(budget=640))
    assert max(whole.values()) < 1e-4
    lost = head_losses(loaded, ids, heads, SMALL)
    assert min(lost.values()) > 1e-5
    assert lost != head_losses(loaded, ids, [(0, 0), (2, 1)], SMALL)
    assert head_losses(loaded, ids, heads[1:], SMALL) == {heads[1]: lost[heads[1]]}


@pytest.fixture(scope="module")
def report(loaded: LoadedModel) -> LocalityReport:
    samples = cut_samples(loaded, domain_documents(6000)[:2], 640, 1)
    return measure_locality(loaded, SMALL, samples, rows=4)


def test_every_head_is_measured(report: LocalityReport) -> None:
    assert len(report.points) == 2 * 3 * 2
    assert [p.loss is not None for p in report.points] == [True] * 6 + [False] * 6
    for point in report.points:
        assert 1 / 32 < point.intraclass[16] < 1
        assert point.intraclass[256] < point.intraclass[16]
        assert 1 <= point.waste[16] <= 16
        assert 0 <= point.unread < 1
    assert set(report.predictions) == set(PREDICTORS)
    for found in report.predictions.values():
        assert found.pairs == 6
        assert found.interval is not None
        assert found.interval[0] < found.value < found.interval[1]


def test_a_few_heads_are_spread_over_all(loaded: LoadedModel, report: LocalityReport) -> None:
    """First and last of six, and one between; the others are measured but not pruned."""
    samples = cut_samples(loaded, domain_documents(6000)[:1], 640, 1)
    few = measure_locality(loaded, SMALL, samples, rows=4, limit=3)
    losses = {(p.layer, p.head): p.loss for p in report.points if p.loss is not None}
    found = {(p.layer, p.head): p.loss for p in few.points if p.loss is not None}
    assert found == {head: losses[head] for head in ((0, 0), (1, 0), (2, 1))}
    assert len(few.points) == 6
    assert few.predictions["unread attention"].pairs == 3
    assert "3 KV heads, each pruned alone on 1 text" in grids(few)[1].caption


def test_tables_and_charts_come_from_the_report(report: LocalityReport) -> None:
    domains, predictions, heads = grids(report)
    assert [row[0] for row in domains.rows] == ["code", "documentation"]
    expected = report.of_domain("code", PREDICTORS["waste, 16 keys"]).value
    assert domains.rows[0][4] == f"{expected:.2f}"
    assert len(predictions.rows) == len(PREDICTORS)
    assert len(heads.rows) == 6
    assert [chart.x for chart in charts(report)[1:]] == ["intraclass, 16 keys", "unread attention"]


def test_a_mixture_has_pieces_of_every_domain() -> None:
    *others, mixture = locality_documents(9 * PIECE)
    assert [doc.name for doc in others][-2:] == ["prose", "mathematics"]
    assert len(others) == 7
    for i, doc in enumerate(others):
        assert mixture.text[i * (PIECE + 2) :].startswith(doc.text[:PIECE])
    assert mixture.text[7 * (PIECE + 2) :].startswith(others[0].text[PIECE : 2 * PIECE])


def test_the_command_measures_every_domain(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hipserve.cli.options.load_model", lambda *_: loaded)
    words = "lab locality --length 1200 --rows 1 --budget 64 --losses 0 --json"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    domains = list(json.loads(done.stdout)["samples"].values())
    assert domains == [doc.domain for doc in locality_documents(1)]


def test_too_short_texts_are_refused(loaded: LoadedModel) -> None:
    samples = cut_samples(loaded, domain_documents(6000)[:1], 256, 1)
    with pytest.raises(FitError, match="leave no range of 256 keys"):
        measure_locality(loaded, SMALL, samples)


def test_the_command_prints_json(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(domain_documents(9000)[0].text[:9000])
    words = "lab locality --length 1200 --rows 2 --budget 64 --losses 0 --json --device cpu --text"
    done = CliRunner().invoke(app, [*words.split(), str(text)])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["predictions"] == {}
    assert values["points"][0]["loss"] is None
