"""`lab cache`: policies by hand, Belady's law, and traces that say what attention did."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hipserve import ArgumentError, FitError, HiPConfig, HipserveError
from hipserve.cli.main import app
from hipserve.lab.cache.policies import POLICIES, simulate
from hipserve.lab.cache.report import CacheReport, measure_cache
from hipserve.lab.cache.shown import charts, grids
from hipserve.lab.cache.trace import record_trace
from hipserve.lab.recorder import Call, record_heads, watched
from hipserve.lab.samples import cut_samples, domain_documents
from hipserve.lab.shown import Chart, Grid, Line
from hipserve.models import LoadedModel, load
from hipserve.models.passes import make_cache, read

SMALL = HiPConfig(
    budget=64,
    budget_factors=[[0.75, 1.25]],
    num_sink_tokens=16,
    sliding_window=64,
    query_block_size=16,
    dense_below=0,
)
A, B, C, D = 1, 2, 3, 4


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(device="cpu", dtype=torch.float32)


def some_ids(count: int) -> torch.Tensor:
    return torch.randint(3, 8192, (1, count), generator=torch.Generator().manual_seed(1))


BY_HAND: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    # Room for two. C takes the place of A, which was used longest ago, then A that of B.
    "lru": ([[A], [B], [B], [C], [B], [A], [C]], [[A], [B], [], [C], [], [A], [C]]),
    # A was used three times, B once: C takes the place of B although B came last.
    "frequency": ([[A], [A], [A], [B], [C], [A], [B]], [[A], [], [], [B], [C], [], [B]]),
    # All were used: the hand takes that away from A and B, and A goes. Then B, not used since, goes
    # although it came before A was used last.
    "clock": ([[A], [B], [A], [C], [D], [C]], [[A], [B], [], [C], [D], []]),
    # B comes back later than A.
    "belady": ([[A], [B], [C], [A], [B]], [[A], [B], [C], [], [B]]),
}


@pytest.mark.parametrize("policy", list(POLICIES))
def test_policies_by_hand(policy: str) -> None:
    requests, missing = BY_HAND[policy]
    assert [sorted(step) for step in simulate(requests, 2, policy)] == missing


def test_the_clock_gives_a_second_chance() -> None:
    """Room for three: A, B and C come, the hand clears all and takes A for D. B is used again and
    keeps its place when A comes back, C does not."""
    steps = simulate([[A], [B], [C], [D], [B], [A], [B], [C]], 3, "clock")
    assert [sorted(step) for step in steps] == [[A], [B], [C], [D], [], [A], [], [C]]


def test_blocks_of_the_same_step_stay() -> None:
    """B is the oldest, but the step that needs room reads it."""
    for policy in POLICIES:
        steps = simulate([[A, B], [A], [B, C], [B, C]], 2, policy)
        assert [sorted(step) for step in steps] == [[A, B], [], [C], []], policy


def test_wrong_capacities_and_policies_are_refused() -> None:
    with pytest.raises(ArgumentError, match="the 2 blocks of a step"):
        simulate([[A, B]], 1, "lru")
    with pytest.raises(ArgumentError, match="did you mean lru"):
        simulate([[A]], 1, "lrw")


steps_of_blocks = st.lists(
    st.sets(st.integers(0, 9), min_size=1, max_size=3).map(sorted), min_size=1, max_size=40
)


@given(steps_of_blocks, st.integers(3, 12))
def test_nothing_beats_belady(requests: list[list[int]], capacity: int) -> None:
    missed = {p: sum(map(len, simulate(requests, capacity, p))) for p in POLICIES}
    distinct = len({block for request in requests for block in request})
    assert min(missed.values()) == missed["belady"] >= distinct
    if capacity >= distinct:
        assert set(missed.values()) == {distinct}, "only what was never seen is missing"


@given(
    st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=2).map(sorted), max_size=7),
    st.integers(2, 3),
)
def test_belady_is_the_optimum(requests: list[list[int]], capacity: int) -> None:
    assert sum(map(len, simulate(requests, capacity, "belady"))) == optimum(requests, capacity)


def optimum(requests: list[list[int]], capacity: int) -> int:
    """Fewest misses of all ways to keep blocks."""
    costs: dict[frozenset[int], int] = {frozenset(): 0}
    for blocks in requests:
        request, later = frozenset(blocks), dict[frozenset[int], int]()
        for resident, cost in costs.items():
            cost += len(request - resident)
            others = sorted(resident - request)
            for kept in range(min(len(others), capacity - len(request)) + 1):
                for some in itertools.combinations(others, kept):
                    now = request | set(some)
                    later[now] = min(later.get(now, cost), cost)
        costs = later
    return min(costs.values())


def test_watching_changes_nothing_and_ends(loaded: LoadedModel) -> None:
    loaded.use(SMALL)
    ids, seen = some_ids(300), list[int]()

    def note(call: Call, out: torch.Tensor) -> torch.Tensor:
        seen.append(call.layer)
        return out

    with torch.no_grad():
        before = loaded.model(ids, use_cache=False).logits
        with watched(loaded, note):
            during = loaded.model(ids, use_cache=False).logits
        loaded.model(ids, use_cache=False)
    assert seen == list(range(12))
    assert torch.equal(before, during)


def test_recorded_heads_have_the_scores_of_eager_attention(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax of what is recorded, in chunks, is what eager attention returns as its weights."""
    monkeypatch.setattr("hipserve.models.passes.CHUNK", 128)
    ids, positions = some_ids(300), torch.tensor([5, 127, 128, 299])
    records = record_heads(loaded, ids, positions)
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = loaded.model(ids, use_cache=False, output_attentions=True).attentions
    assert [record.layer for record in records] == list(range(12))
    for record in records:
        for head in range(record.num_kv_heads):
            for i, position in enumerate(positions.tolist()):
                found = record.scores(head, 0, position + 1)[i].softmax(-1)
                expected = weights[record.layer][0, head * 4 : head * 4 + 4, position]
                torch.testing.assert_close(found, expected[:, : position + 1], atol=1e-4, rtol=1e-3)


def test_traces_hold_what_attention_reads(loaded: LoadedModel) -> None:
    """Blocks of the selection, and their share of a softmax over all keys that the row reads."""
    ids, config = some_ids(400), SMALL.replace(budget_factors=[[]])  # as many blocks in all heads
    traces = record_trace(loaded, ids, 3, config)
    assert [trace.layer for trace in traces] == list(range(12))
    assert traces[0].blocks.shape == (3, 2, 4)
    assert traces[0].keys == 400
    loaded.use(config.replace(decode_dense_below=0))
    cache, shares = make_cache(loaded), list[torch.Tensor]()

    def expect(call: Call, out: torch.Tensor) -> torch.Tensor:
        layer: Any = cache.layers[call.layer]
        selection = layer.reuse.selection
        start = int(selection.window_start[0])
        keys = layer.pages.pool.k_cache.flatten(0, 1)[: call.key.shape[2]]
        for head in range(2):
            read_keys = torch.zeros(len(keys), dtype=torch.bool)
            read_keys[:16] = read_keys[start:] = True
            for block in selection.indices[0, head].tolist():
                read_keys[block * 16 : block * 16 + 16] = True
            scores = call.query[0, head * 4 : head * 4 + 4, 0] @ keys[:, head].T * call.scale
            mass = scores.masked_fill(~read_keys, -torch.inf).softmax(-1).mean(0)
            blocks = selection.indices[0, head].long()
            shares.append(mass[: len(mass) // 16 * 16].unflatten(0, (-1, 16)).sum(-1)[blocks])
        return out

    with torch.no_grad():
        for _ in read(loaded, ids[:, :-3], cache):
            pass
        for i in range(3):
            with watched(loaded, expect):
                for _ in read(loaded, ids[:, 397 + i : 398 + i], cache):
                    pass
    expected = torch.stack(shares).unflatten(0, (3, 12, 2))
    found = torch.stack([trace.mass for trace in traces], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert 0 < float(found.sum(-1).max()) < 1


@pytest.fixture(scope="module")
def report(loaded: LoadedModel) -> CacheReport:
    samples = cut_samples(loaded, domain_documents(4000), 600, 1)
    return measure_cache(loaded, SMALL, samples, steps=5, capacities=(1, 2, 8), intervals=(1, 2))


def test_larger_caches_hit_more_often_and_belady_most(report: CacheReport) -> None:
    assert list(report.samples.values()) == [
        *("code", "documentation", "licences", "tables", "identifiers")
    ]
    assert len(report.points) == 5 * 12 * 4 * 3 * 2
    for weighted in (False, True):
        ratios = {
            policy: [
                report.ratio(weighted=weighted, policy=policy, capacity=c, interval=1).value
                for c in (1, 2, 8)
            ]
            for policy in POLICIES
        }
        for policy, by_capacity in ratios.items():
            assert by_capacity[0] < by_capacity[1] <= by_capacity[2] < 1, policy
        if not weighted:
            assert all(
                mine <= best
                for mine_all in ratios.values()
                for mine, best in zip(mine_all, ratios["belady"], strict=True)
            )
    often, seldom = (report.bytes_per_step(policy="lru", capacity=1, interval=n) for n in (1, 2))
    assert seldom < often
    assert report.ratio(capacity=1, interval=1).interval() is not None, "over five texts"
    assert report.block_bytes == 2 * 16 * 64 * 4


def test_points_count_by_hand(loaded: LoadedModel, report: CacheReport) -> None:
    sample = cut_samples(loaded, domain_documents(4000)[:1], 600, 1)[0]
    trace = record_trace(loaded, sample.ids, 5, SMALL)[3]
    blocks = [{int(b) for b in step.flatten() if b >= 0} for step in trace.blocks[:, :1]]
    other = [{int(b) for b in step.flatten() if b >= 0} for step in trace.blocks[:, 1:]]
    assert (len(blocks[0]), len(other[0])) == (3, 5)
    hits = sum(len(a & b) for heads in (blocks, other) for a, b in itertools.pairwise(heads))
    point = next(
        p
        for p in report.points
        if (p.domain, p.layer, p.policy, p.capacity, p.interval) == ("code", 3, "lru", 1, 1)
    )
    assert (point.blocks, point.hits) == (4 * (3 + 5), hits), "room for one selection: the last one"


def test_tables_and_charts_come_from_the_report(report: CacheReport) -> None:
    table, domains, layers = grids(report)
    assert len(table.rows) == 4 * 2
    ratio = report.ratio(policy="belady", capacity=8, interval=2).value
    assert table.rows[-1][:2] == ["belady", "2"]
    assert table.rows[-1][-1].startswith(f"{ratio:.3f} ±")
    assert [row[0] for row in domains.rows] == list(report.samples.values())
    assert len(layers.rows) == 12
    chart = charts(report)[1]
    assert chart.lines[-1].label == "belady"
    assert chart.lines[-1].y[-1] == ratio


def test_a_grid_says_the_same_everywhere() -> None:
    grid = Grid("a < b", ["x", "y"], [["1|2", "<3>"]], "below")
    assert "| 1\\|2 | <3> |" in grid.to_markdown()
    assert "<td>1|2</td><td>&lt;3&gt;</td>" in grid.to_html()
    assert "a &lt; b" in grid.to_html()


def test_pictures_are_svg_and_the_same_every_time() -> None:
    pytest.importorskip("matplotlib")
    chart = Chart("title", "x", "y", [Line("a line", [1, 2], [3, 4]), Line("b", [1], [2], "dots")])
    svg = chart.to_svg()
    assert svg.startswith("<svg")
    assert ">a line</text>" in svg
    assert svg == chart.to_svg()


def test_without_matplotlib_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(HipserveError, match="matplotlib, which is not installed") as caught:
        Chart("title", "x", "y", []).to_svg()
    assert caught.value.hint == "pip install 'hipserve[lab]'"


def test_too_little_to_prune_is_said(loaded: LoadedModel) -> None:
    with pytest.raises(FitError, match="are not pruned"):
        record_trace(loaded, some_ids(100), 2, SMALL)
    samples = cut_samples(loaded, domain_documents(4000)[:1], 100, 1)
    with pytest.raises(ArgumentError, match="from 2 to 99"):
        measure_cache(loaded, SMALL, samples, steps=100)
    with pytest.raises(FitError, match="no text has 9,000 tokens"):
        cut_samples(loaded, domain_documents(4000)[3:4], 9000, 1)


def test_the_command_prints_json(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(domain_documents(6000)[0].text[:6000])
    words = "lab cache --length 900 --steps 3 --budget 64 --refresh 1 --capacities 1,4 --json"
    done = CliRunner().invoke(app, [*words.split(), "--device", "cpu", "--text", str(text)])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["samples"] == {"text.txt": "txt"}
    assert {point["capacity"] for point in values["points"]} == {1, 4}
    assert sum(point["hits"] for point in values["points"]) > 0


def test_the_name_of_the_experiment_leads_to_the_command() -> None:
    done = CliRunner().invoke(app, ["eval", "cache", "--length", "8k"])
    assert isinstance(done.exception, HipserveError)
    assert "hipserve lab cache" in str(done.exception)
    assert "cache" not in CliRunner().invoke(app, ["eval", "--help"]).output
