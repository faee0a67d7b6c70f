"""`lab representative`: what theory promises of splits, and recall counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hipserve import FitError, HiPConfig
from hipserve.cli.main import app
from hipserve.lab.intervals import mean
from hipserve.lab.recorder import record_heads
from hipserve.lab.representative.recall import SEARCHES, search_recall
from hipserve.lab.representative.report import RepresentativeReport, measure_representatives
from hipserve.lab.representative.shown import charts, grids
from hipserve.lab.representative.splits import (
    REPRESENTATIVES,
    correlation,
    predict_shares,
    split_shares,
)
from hipserve.lab.samples import cut_samples, domain_documents
from hipserve.models import LoadedModel, load

SMALL = HiPConfig(
    budget=64, num_sink_tokens=16, sliding_window=64, query_block_size=16, dense_below=0
)
WALK = {"first": 0.71, "middle": 0.82, "last": 0.71, "random": 0.78, "mean": 0.885}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(device="cpu", dtype=torch.float32)


def noise(rows: int, keys: int) -> torch.Tensor:
    return torch.randn(rows, keys, generator=torch.Generator().manual_seed(2))


def exponential(decay: float, rows: int, keys: int) -> torch.Tensor:
    """Gaussian scores with correlation decay ** distance."""
    scores, fresh = noise(rows, keys), (1 - decay**2) ** 0.5
    for i in range(1, keys):
        scores[:, i] = decay * scores[:, i - 1] + fresh * scores[:, i]
    return scores


def test_splits_of_random_walks() -> None:
    """The paper's argument for the middle: it keeps the half with the maximum in 0.82 of splits."""
    shares = split_shares(noise(20_000, 256).cumsum(1), 256)
    assert list(shares) == list(REPRESENTATIVES)
    for name, expected in WALK.items():
        assert shares[name] == pytest.approx(expected, abs=0.015), name


def test_splits_of_independent_scores() -> None:
    """A coin, but for a mean, which holds a share of the maximum."""
    shares = split_shares(noise(20_000, 256), 256)
    for name in ("first", "middle", "last", "random"):
        assert shares[name] == pytest.approx(0.5, abs=0.015), name
    assert 0.5 < shares["mean"] < 0.6


def test_splits_by_hand() -> None:
    """The maximum is in the second half; only what lies high there points to it."""
    scores = torch.tensor([[3.0, 1, 1, 2, 2, 9, 8, 1]])
    shares = split_shares(scores, 8)
    assert shares["first"] == 0.0
    assert shares["middle"] == shares["mean"] == 1.0
    assert shares["last"] == 0.0


def test_correlation_is_found() -> None:
    rho = correlation(exponential(0.9, 64, 2000), 40)
    expected = 0.9 ** torch.arange(40, dtype=torch.float64)
    torch.testing.assert_close(rho, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_correlation_alone_predicts_gaussian_splits(decay: float) -> None:
    """Measured on one process and predicted from its correlation, within three standard errors."""
    scores = exponential(decay, 400, 1024)
    rho = decay ** torch.arange(64, dtype=torch.float64)
    measured = split_shares(scores, 64)
    predicted = predict_shares(rho, 64, ranges=8000)
    for name in REPRESENTATIVES:
        assert measured[name] == pytest.approx(predicted[name], abs=0.025), name
    assert predicted["first"] < predicted["random"] < predicted["middle"] < predicted["mean"]


def test_recall_is_counted_by_hand(loaded: LoadedModel) -> None:
    """The best blocks from all scores, those of a row's window and sinks apart."""
    ids = torch.randint(3, 8192, (1, 768), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([600, 767])
    record = record_heads(loaded, ids, positions)[4]
    config = SMALL.replace(relative_scores=False, budget=160)  # reads every coarse run
    recall = search_recall(record, positions, config)
    assert set(recall) == set(SEARCHES)
    best = []
    for i, position in enumerate(positions.tolist()):
        end = (position - 63) // 16 * 16
        blocks = record.scores(1, 0, end)[i].amax(0).unflatten(0, (-1, 16)).amax(-1)
        blocks[0] = -torch.inf
        best.append(set(blocks.topk(10).indices.tolist()))
    full = search_recall(record, positions, config.replace(rerank=64))
    assert float(full["bound"][1]) == 1.0, "all keys are candidates"
    found = [
        best_by_means(record.keys[:, 1], record.queries[i], config, p, best[i])
        for i, p in enumerate(positions.tolist())
    ]
    plain = search_recall(record, positions, config.replace(rerank=0, bound_reach=0.0))
    assert float(plain["bound"][1]) == pytest.approx(sum(found) / 20, abs=1e-6)
    for search, shares in recall.items():
        assert 0 <= float(shares.min()) <= float(shares.max()) <= 1, search
    assert float(recall["bound"].mean()) > float(recall["first"].mean())


def best_by_means(
    keys: torch.Tensor, queries: torch.Tensor, config: HiPConfig, position: int, best: set[int]
) -> int:
    """How many of the best blocks have the highest mean scores, without a coarse level."""
    end = (position - 63) // 16
    means = keys[: end * 16].unflatten(0, (-1, 16)).mean(1)
    scores = (queries[4:8] @ means.T).amax(0)
    scores[0] = -torch.inf
    return len(best & set(scores.topk(10).indices.tolist()))


@pytest.fixture(scope="module")
def report(loaded: LoadedModel) -> RepresentativeReport:
    samples = cut_samples(loaded, domain_documents(6000)[:2], 768, 1)
    return measure_representatives(loaded, SMALL, samples, rows=4, sizes=(16, 64))


def test_scores_of_a_model_follow_the_theory(report: RepresentativeReport) -> None:
    assert len(report.points) == 2 * 12 * 2
    for size in (16, 64):
        shares = {name: report.share(size, name).value for name in REPRESENTATIVES}
        assert shares["first"] < shares["middle"] < shares["mean"]
        for name in REPRESENTATIVES:
            predicted = report.share(size, name, predicted=True).value
            assert predicted == pytest.approx(shares[name], abs=0.06), (size, name)
    near, far = (mean([point.correlation[lag] for point in report.points]) for lag in (1, 16))
    assert 0 < far < near < 1
    assert report.recall("bound").value > report.recall("middle").value


def test_tables_and_charts_come_from_the_report(report: RepresentativeReport) -> None:
    splits, recall, heads = grids(report)
    assert [row[1] for row in splits.rows] == ["measured", "predicted"] * 2
    assert splits.rows[0][3] == f"{report.share(16, 'middle').value:.3f}"
    assert [row[0] for row in recall.rows][-1] == "bound"
    assert len(heads.rows) == 24
    by_distance, dots = charts(report)
    assert [line.label for line in by_distance.lines] == ["code", "documentation"]
    assert len(dots.lines) == len(REPRESENTATIVES)
    assert len(dots.lines[0].x) == len(report.points)


def test_too_short_texts_are_refused(loaded: LoadedModel) -> None:
    samples = cut_samples(loaded, domain_documents(6000)[:1], 256, 1)
    with pytest.raises(FitError, match="leave no range of 256 keys"):
        measure_representatives(loaded, SMALL, samples)


def test_the_command_prints_json(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(domain_documents(9000)[0].text[:9000])
    words = "lab representative --length 1200 --rows 2 --budget 64 --json --device cpu --text"
    done = CliRunner().invoke(app, [*words.split(), str(text)])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["sizes"] == [16, 64, 256]
    assert set(values["points"][0]["recall"]) == set(SEARCHES)
