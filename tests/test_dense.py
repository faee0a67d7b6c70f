"""Rows that read everything by torch's kernel, and what a CPU measures to choose it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import native
from hipserve import HiPConfig, hip_attention, platform
from hipserve.attention import crossover, dense, torch_dense
from hipserve.attention.crossover import CONTEXTS, STEP, dense_kernel, rule_for
from hipserve.ops import build_index, select_blocks
from hipserve.plan import BatchLayout, pruning_rule
from hipserve.plan.rule import BREAK_EVEN, SINGLE_ROW
from hipserve.testing.cases import Case, Pages, make_case, random_config, random_shape
from hipserve.testing.oracle import assert_as_exact, readable
from hipserve.types import BlockSelection, KeyPool

HALF = (torch.float32, torch.bfloat16, torch.float16)
KIND = (torch.device("cpu"), torch.bfloat16, 128, 4)
calls: list[tuple[int, ...]] = []


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's kernel takes all it can, in stretches as short as they get; its calls are noted."""
    flash = torch_dense._flash

    def noted(q: torch.Tensor, k: torch.Tensor, *others: Any, **options: Any) -> Any:
        calls.append((*q.shape, *k.shape))
        return flash(q, k, *others, **options)

    calls.clear()
    monkeypatch.setattr(dense, "dense_kernel", lambda *_: "sdpa")
    monkeypatch.setattr(dense, "FEWEST_ROWS", 2)
    monkeypatch.setattr(torch_dense, "SCRATCH", 1)
    monkeypatch.setattr(torch_dense, "_flash", noted)


def some_selection(case: Case, config: HiPConfig) -> BlockSelection:
    return select_blocks(case.q, case.index, case.layout, config=config)


@pytest.mark.usefixtures("by_torch")
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31 - 1))
def test_chunks_in_pages_are_exact(seed: int) -> None:
    """Whole prompts, chunks behind keys and decode rows together, pruned or not."""
    rng = random.Random(seed)
    shape = random_shape(rng, HALF)
    config = random_config(rng, shape.page_size, shape.num_kv_heads)
    case = make_case(shape, config.index_form)
    for selection in (None, some_selection(case, config)):
        out, lse = dense.attend_chosen(
            case.q, case.kv.pool, case.layout, selection, config=config, softcap=shape.softcap
        )
        assert_as_exact(out, lse, case, readable(case, selection, config))


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("query_len", [300, 120, 1])
def test_torch_takes_the_rows_that_read_everything(query_len: int) -> None:
    """Of 300 keys, blocks that end up to 176 (sinks, budget, window) are not pruned."""
    q, k, v = torch.randn(1, query_len, 4, 64), *torch.randn(2, 1, 300, 2, 64)
    config = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32, dense_below=0)
    expected = hip_attention(q, k, v, config=config, backend="cpu", return_lse=True)
    assert not calls
    out = hip_attention(q, k, v, config=config, return_lse=True)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    assert bool(calls) == (query_len == 300)
    assert all(rows == keys for _, _, rows, _, _, _, keys, _ in calls)


@pytest.mark.usefixtures("by_torch")
def test_what_torch_cannot_do_stays_with_our_kernel() -> None:
    q, k = torch.randn(200, 4, 64), torch.randn(1, 200, 2, 64)
    layout = BatchLayout.of(torch.zeros(1, 1, dtype=torch.int32), [200], [200])
    for option in ({"softcap": 30.0}, {"sliding_window": 20}, {"backend": "reference"}):
        dense.attend_chosen(q, KeyPool(k, k), layout, None, **option)
    assert not calls
    dense.attend_chosen(q, KeyPool(k, k), layout, None)
    assert calls


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of its own; what was measured before is forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HIPSERVE_MEASURE", "1")
    return tmp_path / "hipserve" / "measured.json"


def forget() -> None:
    crossover.rule_for.cache_clear()
    crossover._dense_kernel.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What one test measured is nothing to another."""
    forget()
    yield
    forget()


def timed(monkeypatch: pytest.MonkeyPatch, sdpa: float, pruned: float) -> list[int]:
    """Torch takes `sdpa` of the time that our dense kernel takes; a pruned row reads `pruned` keys.
    Gives the lengths that were measured."""
    lengths: list[int] = []

    def quickest(*contenders: Any) -> list[float]:
        case = contenders[0].__self__
        length = case.position + case.q.shape[0]
        lengths.append(length)
        times = {"native": length, "sdpa": sdpa * length, "pruned": pruned}
        return [times[call.__name__] for call in contenders]

    monkeypatch.setattr(crossover, "_quickest", quickest)
    return lengths


@native
@pytest.mark.parametrize(
    ("sdpa", "kernel", "dense_below"),
    [(0.25, "sdpa", 12 * 1024), (0.95, "native", 3 * 1024), (2.0, "native", 3 * 1024)],
)
def test_the_fastest_kernel_decides_where_pruning_pays(
    sdpa: float, kernel: str, dense_below: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pruned row that reads 3,000 keys pays from there on, or from 12,000 on beside a kernel
    that reads four times as fast."""
    lengths = timed(monkeypatch, sdpa, 3000.0)
    rule = rule_for(HiPConfig(), *KIND)
    assert dense_kernel(*("cpu", *KIND[1:])) == kernel
    assert rule.dense_below == dense_below
    assert rule.decode_dense_below == BREAK_EVEN["cpu"] * SINGLE_ROW
    measured, kept = len(lengths), json.loads(home.read_text())
    assert sorted(map(str, kept.values())) == sorted([kernel, str(dense_below)])
    forget()
    assert rule_for(HiPConfig(), *KIND) == rule
    assert len(lengths) == measured, "found in the file"
    rule_for(HiPConfig(budget=2048), *KIND)
    assert len(lengths) > measured, "another budget pays elsewhere"


@native
def test_layers_with_budgets_of_their_heads_break_even_where_others_do(home: Path) -> None:
    """Truly measured: one head stands for all, whatever factors the heads of a layer have."""
    rule = rule_for(HiPConfig(), *KIND)
    kept = home.read_text()
    config = HiPConfig(budget_factors=[[0.5, 1.0, 1.5], [2.0, 0.5, 0.5]])
    assert rule_for(config, *KIND) == rule
    assert rule_for(config.of_layer(1), *KIND) == rule
    assert home.read_text() == kept


@native
def test_where_pruning_never_pays_it_begins_beyond_what_was_measured(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 1.0, 1e6)
    below = rule_for(HiPConfig(), *KIND).dense_below
    assert below is not None
    assert CONTEXTS[-1] < 1e6 - STEP <= below <= 1e6 + STEP


@native
@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "\x00"])
def test_a_damaged_file_is_measured_again(
    content: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 0.25, 3000.0)
    home.parent.mkdir()
    home.write_text(content)
    assert rule_for(HiPConfig(), *KIND).dense_below == 12 * 1024
    kept = json.loads(home.read_text())
    for wrong in ("fast", -1, None, True, 2.5):
        home.write_text(json.dumps(dict.fromkeys(kept, wrong)))
        forget()
        assert rule_for(HiPConfig(), *KIND).dense_below == 12 * 1024
        assert {**json.loads(home.read_text()), "a": 1} == {**kept, "a": 1}


@native
def test_no_cache_directory_is_needed(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 0.25, 3000.0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert rule_for(HiPConfig(), *KIND).dense_below == 12 * 1024


@native
def test_nothing_is_measured_where_it_is_switched_off_or_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossover, "_quickest", pytest.fail)
    for dense_below in (0, 5000):
        rule = rule_for(HiPConfig(dense_below=dense_below), *KIND)
        below = (rule.dense_below, rule.decode_dense_below)
        assert below == (dense_below, SINGLE_ROW * dense_below)
    meta = rule_for(HiPConfig(), torch.device("meta"), *KIND[1:])
    monkeypatch.setenv("HIPSERVE_MEASURE", "0")
    assert rule_for(HiPConfig(), *KIND) == meta
    assert meta.dense_below == BREAK_EVEN["cpu"]
    assert dense_kernel("cpu", *KIND[1:]) == "native"
    assert not home.exists()


@native
def test_processes_of_a_host_agree(home: Path) -> None:
    """Of two that start together one measures, the other waits for it: everything is measured once,
    whoever comes first to it."""
    program = """
import torch, hipserve
from hipserve.attention import crossover

def counted(name):
    measure = getattr(crossover, name)
    setattr(crossover, name, lambda *x: (calls.append(name), measure(*x))[1])

calls = []
counted("_faster")
counted("_break_even")
config = hipserve.HiPConfig(budget=256, sliding_window=128)
rule = crossover.rule_for(config, torch.device("cpu"), torch.float32, 16, 1)
kernel = crossover.dense_kernel("cpu", torch.float32, 16, 1)
print(rule.dense_below, kernel, *calls)
"""
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in started]
    assert said[0][:2] == said[1][:2]
    assert sorted(said[0][2:] + said[1][2:]) == ["_break_even", "_faster"]
    assert len(json.loads(home.read_text())) == 2


def test_importing_measures_nothing(home: Path) -> None:
    subprocess.run([sys.executable, "-c", "import hipserve; hipserve.hip_attention"], check=True)
    assert not home.exists()


@native
def test_a_real_measurement_finds_a_crossover(home: Path) -> None:
    slow, fast = crossover._quickest(lambda: sum(range(200_000)), lambda: sum(range(1000)))
    assert slow > 5 * fast
    assert torch.get_num_threads() >= 1
    rule = rule_for(HiPConfig(budget=256, sliding_window=128), *KIND)
    assert rule.dense_below is not None
    assert rule.dense_below % STEP == 0 or rule.dense_below in CONTEXTS
    assert platform.measurements_file() == home


@native
@settings(max_examples=12)
@given(data=st.data())
def test_single_rows_have_a_crossover_of_their_own(data: st.DataObject) -> None:
    """Decode rows and chunks in one batch: the native search equals the definition."""
    lens = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=4))
    rows = [data.draw(st.sampled_from([1, 1, n, (n + 1) // 2])) for n in lens]
    config = HiPConfig(
        budget=64,
        num_sink_tokens=16,
        sliding_window=32,
        dense_below=data.draw(st.sampled_from([0, 200, 300])),
        decode_dense_below=data.draw(st.sampled_from([0, 150, 250])),
    )
    k = torch.randint(-3, 4, (len(lens), 400, 2, 64)).float()
    q = torch.randint(-3, 4, (sum(rows), 4, 64)).float()
    pages = torch.arange(len(lens), dtype=torch.int32)[:, None]
    layout, kv = BatchLayout.of(pages, lens, rows), Pages(KeyPool(k, k), build_index(k))
    found, defined = (
        select_blocks(q, kv.index, layout, config=config, backend=backend)
        for backend in ("cpu", "reference")
    )
    assert torch.equal(found.window_start, defined.window_start)
    assert torch.equal(found.indices, defined.indices)
    assert bool((found.indices >= 0).any()) <= layout.may_prune(pruning_rule(config, "cpu"))
