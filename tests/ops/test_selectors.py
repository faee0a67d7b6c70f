"""A selector is new files only: one that a test registers keeps the laws that hold for any."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import pytest
import torch

from backends import native
from hipserve import BackendError, ConfigError, HiPConfig, hip_attention
from hipserve.config import SelectorName
from hipserve.ops import refresh_blocks, select_blocks
from hipserve.ops.select_blocks import cpu, operator, reference
from hipserve.ops.select_blocks.reference.search import Search
from hipserve.ops.select_blocks.spec import SearchSpec, search_spec
from hipserve.selectors import SELECTORS, Bound, Selector, Tree
from hipserve.testing.cases import Shape, in_pages, make_case, random_config, random_shape
from hipserve.testing.laws import assert_lawful
from hipserve.types import BlockSelection
from hipserve.values import check_choice

SMALL: dict[str, Any] = {
    "budget": 64,
    "num_sink_tokens": 16,
    "sliding_window": 32,
    "dense_below": 0,
}


@dataclass(frozen=True, slots=True)
class Recent(Selector):
    """The key blocks before the window, without the last `seed` of them."""

    name: ClassVar[str] = "recent"
    seed: int


class RecentSearch(Search):
    """Its definition."""

    def select(self) -> torch.Tensor:
        size, options = self.spec.key_block_size, self.spec.selector
        assert isinstance(options, Recent)
        end = self.end // size - options.seed
        first = max(end - self.spec.max_selected, self.begin // size)
        return torch.arange(first, end).expand(self.rows.shape[0], -1)


@pytest.fixture
def recent(monkeypatch: pytest.MonkeyPatch) -> Iterator[HiPConfig]:
    """Registers the selector: one line in each of two dictionaries."""
    monkeypatch.setitem(SELECTORS, "recent", Recent)
    monkeypatch.setitem(reference.SEARCHES, "recent", RecentSearch)
    search_spec.cache_clear()
    operator._announce_reference.cache_clear()
    yield HiPConfig.from_dict({"selector": "recent", **SMALL})
    search_spec.cache_clear()


def test_every_selector_has_a_name_a_definition_and_kernels() -> None:
    assert {name: kind.name for name, kind in SELECTORS.items()} == {n: n for n in SELECTORS}
    for registry in (get_args(SelectorName), reference.SEARCHES, cpu.SEARCHES):
        assert set(registry) == set(SELECTORS)


@dataclass(frozen=True, slots=True)
class Strict(Recent):
    """The same with a check, and with budgets of heads for one value of its option."""

    def __post_init__(self) -> None:
        check_choice("seed", str(self.seed), ("0", "1"))

    @property
    def ranks_keys(self) -> bool:
        return self.seed == 1


def test_a_selector_checks_its_own_options_and_says_what_it_does(
    recent: HiPConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SELECTORS, "recent", Strict)
    for config in (recent, HiPConfig()):
        with pytest.raises(ConfigError, match="seed: expected one of 0, 1, got '2'"):
            config.replace(seed=2)
    assert not recent.ranks_keys
    with pytest.raises(ConfigError, match="budget_factors"):
        recent.replace(budget_factors=[[2.0]])
    assert recent.replace(seed=1, budget_factors=[[2.0]]).max_selected == 16


def test_every_selector_has_kernels_for_gpus() -> None:
    assert set(triton().SEARCHES) == set(SELECTORS)


def triton() -> Any:
    return pytest.importorskip("hipserve.ops.select_blocks.triton", exc_type=ImportError)


def test_options_are_those_of_the_configuration() -> None:
    config = HiPConfig(selector="tree", representative="random", seed=7, rerank=2, bound_reach=0.5)
    assert search_spec(config).selector == Tree(representative="random", seed=7)
    assert search_spec(config).run_size is None
    changed = config.replace(selector="bound")
    assert search_spec(changed).selector == Bound(bound_reach=0.5, rerank=2)
    assert search_spec(changed).run_size == 16
    # Fields of another selector are accepted, and compile no kernel again.
    assert search_spec(changed.replace(seed=8, representative="last")) == search_spec(changed)
    assert search_spec(config.replace(rerank=3, bound_block_size=24)) == search_spec(config)


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_search_survives_its_text(selector: str) -> None:
    """As custom operators take it."""
    spec = search_spec(HiPConfig().replace(selector=selector))
    assert SearchSpec.loads(spec.dumps()) == spec


def test_a_registered_selector_chooses(recent: HiPConfig) -> None:
    case = make_case(Shape((700,), (70,)))
    for seed in (0, 3):
        config = recent.replace(seed=seed)
        assert SearchSpec.loads(search_spec(config).dumps()).selector == Recent(seed=seed)
        found = select_blocks(case.q, case.index, case.layout, config=config, backend="reference")
        for indices, start in zip(found.indices, found.window_start.tolist(), strict=True):
            last = start // 16 - seed
            assert indices.tolist() == [list(range(last - 4, last))] * 2


def test_a_registered_selector_keeps_the_laws_of_selections(recent: HiPConfig) -> None:
    """Inside the middle, ascending; the same in other pages, and whatever comes later."""
    pruned = 0
    for seed in range(30):
        rng = random.Random(seed)
        shape = random_shape(rng, (torch.float32, torch.bfloat16))
        config = random_config(rng, shape.page_size).replace(
            selector="recent", seed=rng.randrange(3)
        )
        case = make_case(shape, config.index_form)
        found = select_blocks(case.q, case.index, case.layout, config=config, backend="reference")
        assert_lawful(found, case, config)
        kv, layout = in_pages(case.ks, case.vs, shape, config.index_form, page_seed=1)
        other = select_blocks(case.q, kv.index, layout, config=config, backend="reference")
        assert torch.equal(found.indices, other.indices)
        pruned += int((found.indices >= 0).any())
    assert pruned > 5
    long = make_case(Shape((900,), (900,)))
    kv, layout = in_pages([long.ks[0][:512]], [long.vs[0][:512]], Shape((512,), (512,)))
    options: dict[str, Any] = {"config": recent, "backend": "reference"}
    whole = select_blocks(long.q, long.index, long.layout, **options)
    early = select_blocks(long.q[:512], kv.index, layout, **options)
    assert torch.equal(whole.indices[:8], early.indices)


def test_a_registered_selector_refreshes_what_is_due(recent: HiPConfig) -> None:
    case = make_case(Shape((700, 500), (1, 1)))
    fresh = select_blocks(case.q, case.index, case.layout, config=recent, backend="reference")
    kept = BlockSelection(torch.full_like(fresh.indices, 7), torch.full_like(fresh.window_start, 9))
    due = torch.tensor([0, 1], dtype=torch.int32)
    refresh_blocks(case.q, case.index, case.layout, kept, due, config=recent, backend="reference")
    assert torch.equal(kept.indices[1], fresh.indices[1])
    assert bool((kept.indices[0] == 7).all())
    assert kept.window_start.tolist() == [9, int(fresh.window_start[1])]


def qkv() -> tuple[torch.Tensor, ...]:
    return torch.randn(1, 40, 4, 64), *torch.randn(2, 1, 900, 2, 64)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attention_reads_what_a_registered_selector_chose(recent: HiPConfig, backend: str) -> None:
    """The blocks before the window: what a longer window would read as well."""
    q, k, v = qkv()
    config = recent.replace(query_block_size=1, query_stride=1)
    out = hip_attention(q, k, v, config=config, backend=backend)
    longer = [*range(16), *range(900 - 32 - 4 - 64, 900)]  # the window starts at 864, 4 keys early
    last, keys, values = q[0, -1], k[0, longer, 0], v[0, longer, 0]
    expected = torch.softmax(keys @ last[0] / 8, dim=0) @ values
    torch.testing.assert_close(out[0, -1, 0], expected, atol=1e-5, rtol=1e-5)
    dense = hip_attention(q, k, v, config=config.replace(dense_below=901), backend=backend)
    assert (out - dense).abs().max() > 1e-3
    room = hip_attention(q, k, v, config=config.replace(budget=1024), backend=backend)
    torch.testing.assert_close(room, dense, atol=1e-5, rtol=1e-5)


def test_a_registered_selector_compiles(recent: HiPConfig) -> None:
    torch.compiler.reset()
    q, k, v = qkv()
    compiled = torch.compile(
        lambda *x: hip_attention(*x, config=recent, backend="reference"),
        backend="aot_eager",
        fullgraph=True,
    )
    assert torch.equal(
        compiled(q, k, v), hip_attention(q, k, v, config=recent, backend="reference")
    )


REFUSAL = 'backend="{}" cannot run: selector "recent" has no kernels there; use backend="auto"'


def test_a_gpu_without_kernels_refuses_by_name(
    recent: HiPConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton()
    case = make_case(Shape((700,), (70,)))
    monkeypatch.setattr(operator, "resolve_backend", lambda *_: "triton")
    with pytest.raises(BackendError, match=REFUSAL.format("triton")):
        select_blocks(case.q, case.index, case.layout, config=recent, backend="triton")


@native
def test_a_cpu_without_kernels_refuses_by_name_and_auto_runs_the_definition(
    recent: HiPConfig, caplog: pytest.LogCaptureFixture
) -> None:
    case = make_case(Shape((700,), (70,)))
    tensors = (case.q, case.index, case.layout)
    with pytest.raises(BackendError, match=REFUSAL.format("cpu")):
        select_blocks(*tensors, config=recent, backend="cpu")
    expected = select_blocks(*tensors, config=recent, backend="reference")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            got = select_blocks(*tensors, config=recent)
    assert torch.equal(got.indices, expected.indices)
    warnings = [r.getMessage() for r in caplog.records if "recent" in r.getMessage()]
    assert warnings == ['selector "recent" has no cpu kernels: eager torch searches']


def test_a_selector_that_nobody_registered_is_refused() -> None:
    with pytest.raises(ConfigError, match="selector: expected one of tree, bound, got 'recent'"):
        HiPConfig.from_dict({"selector": "recent"})
