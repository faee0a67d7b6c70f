"""`lab meter`: estimates beside all keys, and what it says of loss."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from hipserve import FitError, HiPConfig, hip_attention
from hipserve.cli.main import app
from hipserve.lab.meter import (
    EDGES,
    LayerPoint,
    MeterReport,
    Truth,
    charts,
    grids,
    measure_meter,
    sentences,
    spearman,
)
from hipserve.lab.samples import cut_samples, domain_documents
from hipserve.models import load

SMALL = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=64, query_block_size=16)


@pytest.fixture(scope="module")
def report() -> MeterReport:
    """Of the bundled model: a random one attends to nothing in particular."""
    loaded = load()
    samples = cut_samples(loaded, domain_documents(12000), 1024, 1)
    return measure_meter(loaded, SMALL, samples)


def test_the_truth_is_what_float64_says() -> None:
    """Of every query block's middle row; the last quarter of all keys are what is read besides."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 512, heads, 16, generator=random) for heads in (4, 2))
    truth = Truth(0)
    config = SMALL.replace(dense_below=0)
    _, lse = hip_attention(q, k, k, config=config, return_lse=True, meter=truth)
    rows = torch.cat(truth.positions)
    scores = torch.einsum(
        "qhd,khd->qhk", q[0, rows].double(), k[0].double().repeat_interleave(2, 1)
    )
    hidden = torch.arange(512) > rows[:, None, None]
    everything = (scores / 4).masked_fill(hidden, -torch.inf).logsumexp(-1)
    expected = 1 - (lse[0, rows].double() - everything).exp()
    assert float(expected.mean()) > 0.1
    torch.testing.assert_close(torch.cat(truth.unread).double(), expected, rtol=1e-4, atol=1e-5)


def test_estimates_are_near_in_every_layer(report: MeterReport) -> None:
    layers = [point for point in report.points if point.layer is not None]
    assert len(layers) == 12 * len(report.samples)
    assert report.rows == 48  # query blocks of the last three quarters
    for layer in range(12):
        found = report.of_layer(layer, lambda point: point.unread).value
        assert report.of_layer(layer, lambda point: point.estimated).value == pytest.approx(
            found, rel=0.15, abs=0.01
        )
        assert report.of_layer(layer, lambda point: point.rank).value > 0.8
    assert sum(found.shares for found in report.bins) == len(layers) * report.rows * 8


def test_tables_charts_and_json_say_the_same(report: MeterReport) -> None:
    layers, calibration = grids(report)
    everything = report.of_layer(None, lambda point: point.unread).value
    assert layers.rows[0][:2] == ["mean of all", layers.rows[0][1]]
    assert layers.rows[0][1].startswith(f"{everything:.3f}")
    assert len(calibration.rows) == len(EDGES) - 1
    assert "rank correlation with KL" in sentences(report)[0]
    assert [len(chart.lines) for chart in charts(report)] == [2, 2]
    assert json.loads(json.dumps(report.to_dict()))["rows"] == 48


def test_a_verdict_needs_texts_and_an_interval_above_zero() -> None:
    def made(ranks: list[float]) -> MeterReport:
        points = [
            LayerPoint(str(i), None, 0.1, 0.1, 0, 1, rank, rank) for i, rank in enumerate(ranks)
        ]
        return MeterReport("tiny", 1024, 9, {}, {}, points, [])

    assert "predicts" in sentences(made([0.3, 0.4, 0.35, 0.3]))[0]
    assert "is not shown to predict" in sentences(made([0.3, -0.4, 0.35, 0.0]))[0]
    assert "too few texts" in sentences(made([0.3]))[0]


def test_spearman_is_that_of_ranks() -> None:
    x = torch.tensor([3.0, 1.0, 2.0, 10.0])
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.ones(4)) == 0


def test_texts_in_which_nothing_is_pruned_are_refused() -> None:
    loaded = load()
    samples = cut_samples(loaded, domain_documents(2000)[:1], 128, 1)
    with pytest.raises(FitError, match="nothing is pruned"):
        measure_meter(loaded, SMALL, samples)


def test_the_command_prints_tables() -> None:
    words = ["lab", "meter", "--length", "1k", "--text", "README.md", "--budget", "64", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["points"]) == 13
