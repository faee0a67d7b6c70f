"""The benchmark refuses wrong results, scales heads rightly, says where numbers come from."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from hipserve import HiPConfig
from hipserve.cli.main import app, exit_code
from hipserve.cli.numbers import format_ratio, format_seconds
from hipserve.errors import ArgumentError, NumericsError
from hipserve.lab import LayerShape, Limits, bench_attention, fit_exponent
from hipserve.lab.speed import decode as decode_module
from hipserve.lab.speed import prefill as prefill_module
from hipserve.lab.speed import serve
from hipserve.lab.speed.attention import time_prefill
from hipserve.lab.speed.decode import Decode
from hipserve.lab.speed.numerics import check_rows
from hipserve.lab.speed.prefill import Prefill
from hipserve.lab.speed.timing import Contender, in_turn, median_of_cycles
from hipserve.platform import native_library
from hipserve.serving.command_line import Server

SHAPE = LayerShape(4, 2, 64)
SMALL = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32, dense_below=0)
FAST = Limits(rounds=2, seconds=0.2)
RUN = ["bench", "attention", "--lengths", "300,600", "--heads", "4/2", "--head-dim", "64"]


@pytest.fixture(scope="module")
def report():
    return bench_attention([300, 600], shape=SHAPE, config=SMALL, limits=FAST)


def test_every_length_has_every_contender(report) -> None:
    assert [(p.phase, p.length) for p in report.points] == [
        ("prefill", 300),
        ("prefill", 600),
        ("decode", 300),
        ("decode", 600),
    ]
    for point in report.points:
        assert {"hip", "dense", "sdpa", "select", "attend"} <= set(point.timings)
        assert all(t.seconds > 0 and t.rounds >= 1 for t in point.timings.values())
    assert all(check.passed for check in report.checks)


def test_the_report_says_where_it_comes_from(report) -> None:
    made = json.loads(json.dumps(report.to_dict()))
    assert made["provenance"]["torch"] == torch.__version__
    assert made["provenance"]["threads"] == torch.get_num_threads()
    assert made["config"]["budget"] == 64
    assert len(made["points"]) == 4


def test_the_csv_holds_every_time_and_its_origin(report) -> None:
    text = report.to_csv()
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    for name in ("cpu", "isa", "threads", "torch", "commit", "date", "config.budget", "heads"):
        assert any(line.startswith(f"# {name}: ") for line in comments), name
    rows = list(csv.DictReader(io.StringIO(text[text.index("phase,") :])))
    assert len(rows) == sum(len(point.timings) for point in report.points)
    first = report.points[0].timings["hip"]
    assert math.isclose(float(rows[0]["seconds"]), first.seconds, rel_tol=1e-4)


def test_heads_scale_to_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 2 KV heads and its 2 query heads run, with every contender."""
    monkeypatch.setattr(prefill_module, "WHOLE_LAYER", 32)
    clock = iter(range(10_000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    timings = time_prefill(Prefill(SHAPE, 64, torch.float32, SMALL, "reference"), Limits(1))
    assert {(t.seconds, t.heads_timed) for t in timings.values()} == {(2.0, 2)}
    monkeypatch.setattr(prefill_module, "WHOLE_LAYER", 64)
    timings = time_prefill(Prefill(SHAPE, 64, torch.float32, SMALL, "reference"), Limits(1))
    assert {(t.seconds, t.heads_timed) for t in timings.values()} == {(1.0, 4)}


def test_sdpa_computes_what_ours_computes() -> None:
    """As many heads, whatever way of calling it is the fastest; in a decode step too."""
    for heads in (1, 2):
        case = Prefill(SHAPE, 200, torch.float32, SMALL, "cpu" if native_library().tier else "auto")
        case.kv_heads = heads
        case.q, case.k, case.v = case.q[:, : 2 * heads], case.k[:, :, :heads], case.v[:, :, :heads]
        out = case.sdpa()(200)[0].transpose(0, 1)
        torch.testing.assert_close(out, case.dense(case.q, case.layout), atol=2e-5, rtol=2e-5)
    step = Decode(SHAPE, 200, torch.float32, SMALL, "auto")
    out = step.sdpa()(3).reshape(1, 4, 64)
    torch.testing.assert_close(out, step.attend(3, None), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rounds", [1, 3])
def test_everybody_warms_up_uncounted(rounds: int) -> None:
    order: list[tuple[str, int]] = []
    contenders = {
        "long": Contender(
            lambda turn: order.append(("long", turn)), 1, lambda _: order.append(("short", -1))
        ),
        "other": Contender(lambda turn: order.append(("other", turn))),
    }
    times = in_turn(contenders, Limits(rounds))
    assert order[:2] == [("short", -1), ("other", 0)]
    assert order[2:] == [(name, turn) for turn in range(rounds) for name in ("long", "other")]
    assert [len(t) for t in times.values()] == [rounds, rounds]


def test_where_hip_reads_everything_the_table_says_so() -> None:
    command = [*RUN, "--rounds", "1", "--budget", "64"]
    lines = CliRunner().invoke(app, command).stdout.splitlines()
    assert any("* HiP reads everything" in line for line in lines)
    rows = [line.split() for line in lines if line.strip().startswith(("300", "600"))]
    assert len(rows) == 4
    assert all("*" in "".join(row) and row[-1] == "-" for row in rows)
    assert not any("every 1" in line for line in lines)


def wrong(function):
    """An operation whose results are off by a little."""

    def call(*args, **options):
        out, lse = function(*args, **options)
        return out * 1.05, lse

    return call


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_wrong_attention_is_refused(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = prefill_module if phase == "prefill" else decode_module
    broken = wrong(module.block_sparse_attention)
    monkeypatch.setattr(module, "block_sparse_attention", broken)
    with pytest.raises(NumericsError, match=f"{phase}.*dense attention: error"):
        bench_attention([600], phases=[phase], shape=SHAPE, config=SMALL, limits=FAST)


def test_a_wrong_selection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    select = prefill_module.select_blocks

    def shifted(*args, backend: str = "auto", **options):
        selection = select(*args, backend=backend, **options)
        if backend != "reference":
            selection.indices.clamp_(max=5)
        return selection

    monkeypatch.setattr(prefill_module, "select_blocks", shifted)
    with pytest.raises(NumericsError, match="chosen"):
        bench_attention([600], phases=["prefill"], shape=SHAPE, config=SMALL, limits=FAST)


def test_the_command_prints_nothing_of_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = wrong(prefill_module.block_sparse_attention)
    monkeypatch.setattr(prefill_module, "block_sparse_attention", broken)
    result = CliRunner().invoke(app, RUN)
    assert isinstance(result.exception, NumericsError)
    assert exit_code(result.exception) == 1
    assert result.stdout == ""


def test_nan_passes_no_check() -> None:
    q, kv = torch.randn(1, 2, 64), torch.randn(8, 1, 64)
    out = torch.full((1, 2, 64), torch.nan)
    positions, keys = torch.tensor([7]), [torch.arange(8)]
    assert not check_rows("nan", out, q, kv, kv, positions, keys).passed


def test_the_command_prints_tables_and_writes_the_csv(tmp_path: Path) -> None:
    target = tmp_path / "new" / "speed.csv"
    result = CliRunner().invoke(app, [*RUN, "--rounds", "1", "--csv", str(target)])
    assert result.exit_code == 0, result.output
    for word in ("numeric check", "machine:", "x SDPA", "x ours", "prefill", "decode", "600"):
        assert word in result.stdout
    assert target.read_text().count("\n") > 20
    pytest.importorskip("matplotlib")
    picture = tmp_path / "speed.svg"
    plot().draw(*plot().read(target), picture)
    words = [e.text or "" for e in ElementTree.parse(picture).iter() if e.tag.endswith("text")]
    assert sum(word.endswith("x") for word in words) == 4  # our kernels, in both phases


def plot():
    path = Path(__file__).parent.parent / "benchmarks" / "plot.py"
    spec = importlib.util.spec_from_file_location("plot", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--phase", "both of them"),
        ("--heads", "32"),
        ("--heads", "5/2"),
        ("--dtype", "float64"),
        ("--device", "cuda"),
        ("--clock", "sun"),
        ("--lengths", "0"),
        ("--csv", "/dev/null/x.csv"),
    ],
)
def test_bad_options_are_named(option: str, value: str) -> None:
    run = [*RUN[:3], "64", *RUN[4:], "--rounds", "1"]
    if option in run:  # an option that is given twice is refused as such
        del run[run.index(option) : run.index(option) + 2]
    result = CliRunner().invoke(app, [*run, option, value])
    assert isinstance(result.exception, ArgumentError)
    assert str(result.exception).startswith(option)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.08, 2.0])
def test_the_fit_finds_the_exponent(exponent: float) -> None:
    lengths = [8192, 16384, 32768, 131072]
    assert math.isclose(
        fit_exponent(lengths, [3e-7 * n**exponent for n in lengths]), exponent, abs_tol=1e-9
    )


def test_contenders_take_turns_until_their_time_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def lasting(name: str, seconds: float):
        def call(turn: int) -> None:
            order.append((name, turn))
            now[0] += seconds

        return Contender(call, scale=10)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    contenders = {"slow": lasting("slow", 5.0), "fast": lasting("fast", 1.0)}
    times = in_turn(contenders, Limits(rounds=3, seconds=4.0))
    warm = [("slow", 0), ("fast", 0)]
    assert order == [*warm, ("slow", 0), ("fast", 0), ("fast", 1), ("fast", 2)]
    assert times == {"slow": [50.0], "fast": [10.0, 10.0, 10.0]}


@pytest.mark.parametrize(("length", "pieces"), [(512, []), (40_000, [16_384, 32_768])])
def test_a_server_is_asked_when_the_other_is_quiet(
    length: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's processes keep a core busy for a second after an answer: no question falls into it."""
    now, asked, answered = [0.0], [], [-10.0]

    def ask(server: Server, prompt: list[int], max_tokens: int, salt: str) -> serve.Answer:
        asked.append((server.name, len(prompt), max_tokens, now[0] - answered[0]))
        now[0] += 3.0
        answered[0] = now[0]
        return serve.Answer("", 0.25, (), max_tokens)

    monkeypatch.setattr(serve, "ask", ask)
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    servers = [Server("m", name, None) for name in ("dense", "hip")]
    answers = serve.ask_in_turn(servers, [0] * length)
    expected = [(end, 1) for end in pieces] + [(length, serve.NEW_TOKENS)]
    assert [x[:3] for x in asked] == [(s.name, *x) for x in expected for s in servers]
    assert all(pause > 1 for *_, pause in asked)
    assert [answer.first for answer in answers] == [0.25 * len(expected)] * 2


def test_cycles_average_and_then_take_the_median() -> None:
    assert median_of_cycles([9.0, 1.0, 8.0, 2.0, 100.0, 0.0, 7.0], 2) == 5.0


def test_numbers_are_short() -> None:
    assert [format_seconds(x) for x in (12.34, 0.00456, 2.5e-5)] == ["12.3 s", "4.56 ms", "25.0 µs"]
    assert [format_ratio(x) for x in (148.2, 38.46, 9.8)] == ["148x", "38.5x", "9.80x"]


MISTYPED = {
    "extend.py --heads 4": "'4': write query heads / KV heads",
    "extend.py --heads 8/3": "the first a multiple of the second",
    "extend.py --length 32x": "'32x' is no number",
    "extend.py --code-bits 3": "code_bits: expected",
    "extend.py --rounds 0": "0 is less than 1",
    "depth.py 8k,x": "'x' is no number",
    "offload.py --tokens x": "'x' is no number",
    "offload_file.py --host-memory x --tokens 8": "host_memory: expected a size",
    "offload_model.py --device cuda": "needs a GPU",
    "gpu.py check": "needs a GPU",
    "retrieval.py --configs dfault": "preset: expected",
    "retrieval.py --configs dense+budget": "is no number",
}


@pytest.mark.parametrize(("words", "said"), MISTYPED.items())
def test_what_a_benchmark_cannot_use_ends_in_a_sentence(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = words.split()
    path = Path(__file__).parent.parent / "benchmarks" / name
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
