"""`lab speed`: every tier runs in a process of its own, is checked, and its crossover is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hipserve import ArgumentError, HiPConfig
from hipserve.cli.main import app
from hipserve.errors import NumericsError
from hipserve.lab import LayerShape, Limits
from hipserve.lab.speed import machine
from hipserve.lab.speed.machine import (
    REFERENCE,
    MachineReport,
    crossing,
    machine_tiers,
    measure_machine,
)
from hipserve.lab.speed.shown import charts, grids, sentences
from hipserve.platform import native_library

SHAPE = LayerShape(4, 2, 64)
SMALL = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32)
FAST = Limits(rounds=1, seconds=0.1)


@pytest.fixture(scope="module")
def report() -> MachineReport:
    if native_library().tier is None:
        pytest.skip("the native kernels were not built")
    said: list[str] = []
    made = measure_machine(
        [100, 2100, 2300],
        tiers=[REFERENCE, "baseline"],
        shape=SHAPE,
        config=SMALL,
        limits=FAST,
        progress=said.append,
    )
    assert said == ["reference, 1 of 2", "baseline, 2 of 2"]
    return made


def test_a_tier_is_forced_in_its_process(report: MachineReport) -> None:
    reference, baseline = report.tiers
    assert (reference.measured.backend, baseline.measured.backend) == ("reference", "cpu")
    assert baseline.measured.provenance.isa == "baseline"
    assert [p.length for p in reference.measured.of("prefill")] == [100]
    assert [p.length for p in baseline.measured.of("decode")] == [100, 2100, 2300]
    assert all(check.passed for tier in report.tiers for check in tier.measured.checks)
    assert [p.reads_all for p in baseline.measured.of("prefill")] == [True, False, False]


def test_the_process_ran_the_kernels_of_the_tier() -> None:
    if native_library().tier is None:
        pytest.skip("the native kernels were not built")
    with machine.process("baseline") as pool:
        assert pool.submit(machine.running_tier).result() == "baseline"


def test_tables_sentences_and_charts_say_the_same(report: MachineReport) -> None:
    prefill, decode, parts, steps = grids(report)
    assert [row[0] for row in prefill.rows] == [REFERENCE, "baseline"]
    assert prefill.rows[0][3:] == ["-", "-", "-"]
    point = report.tiers[1].measured.of("decode")[-1]
    slower = min(point.seconds("dense"), point.seconds("sdpa")) / point.seconds("hip")
    assert decode.rows[1][-1] == f"{slower:.2f}"
    assert [row[0] for row in parts.rows] == [row[0] for row in steps.rows] == ["baseline"]
    assert parts.headings == ["tier", "pruned", "index", "select", "attend", "dense", "sdpa"]
    count = sum(len(tier.measured.checks) for tier in report.tiers)
    assert sentences(report) == [f"numeric checks against float64: {count} of {count} passed"]
    assert [line.label for line in charts(report)[0].lines] == ["baseline"]
    values = json.loads(json.dumps(report.to_dict()))
    assert values["tiers"][1]["measured"]["config"]["dense_below"] == 0
    assert values["tiers"][0]["used"] == {"prefill": 2048, "decode": 6144}


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([0.5, 0.9, 0.99], None),
        ([1.1, 1.5, 3.0], 1000),
        ([0.5, 2.0, 4.0], 2000),  # in the middle of the logarithms of 1,000 and 4,000
        ([2.0, 0.5, 2.0], 8000),  # what counts is where it stays
        ([], None),
    ],
)
def test_crossing(gains: list[float], expected: int | None) -> None:
    assert crossing([1000, 4000, 16000][: len(gains)], gains) == expected


def test_what_cannot_be_measured_is_refused_before_anything_runs() -> None:
    with pytest.raises(ArgumentError, match=r"tiers: expected one of reference.*did you mean"):
        measure_machine([300], tiers=["refrence"])
    with pytest.raises(ArgumentError, match="ascending"):
        measure_machine([600, 300])
    with pytest.raises(ArgumentError, match="32/8"):
        measure_machine([300], shape=LayerShape(3, 2, 64))


def test_wrong_results_of_a_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the gate comes out of the other process with its words."""
    monkeypatch.setattr(machine, "_measure", raise_numerics)
    with pytest.raises(NumericsError, match="prefill: error 1; none is allowed"):
        measure_machine([300], tiers=[REFERENCE], shape=SHAPE)


def raise_numerics(*_: object) -> None:
    raise NumericsError("prefill: error 1", "none is allowed")


def test_the_command(tmp_path: Path) -> None:
    svg = tmp_path / "speed.svg"
    words = "lab speed --lengths 300,600 --tiers reference --heads 4/2 --head-dim 64 --rounds 1"
    words += " --budget 64 --threads 1 --clock cpu"
    done = CliRunner().invoke(app, [*words.split(), "--svg", str(svg)])
    assert done.exit_code == 0, done.output
    assert "numeric checks against float64" in done.stdout
    assert svg.read_text("utf-8").startswith("<svg")
    assert machine_tiers()[0] == REFERENCE
