"""Selections that follow requests through the changing batches of an engine."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipserve.attention import RequestSelections
from hipserve.attention.selections import Search
from hipserve.config import HiPConfig
from hipserve.ops import build_index, select_blocks
from hipserve.plan import (
    BatchLayout,
    DecodeBuffers,
    RefreshSchedule,
    SequenceStep,
    StepPlan,
    pruning_rule,
    split_batch,
)

CONFIG = HiPConfig(
    selector="bound",
    key_block_size=16,
    budget=32,
    num_sink_tokens=16,
    sliding_window=16,
    query_block_size=16,
    dense_below=0,
    refresh_interval=3,
)
RULE = pruning_rule(CONFIG, "cpu")
PAGE = 64


def decode(request: str, seq_len: int) -> SequenceStep:
    return SequenceStep(request, seq_len, decoding=True)


def freshness(schedule: RefreshSchedule, *steps: SequenceStep) -> list[bool]:
    return [fresh for _, fresh in schedule.step(list(steps))]


def test_a_selection_serves_as_many_steps_as_asked() -> None:
    schedule = RefreshSchedule(4, refresh_interval=3)
    seen = [freshness(schedule, decode("a", 100 + i))[0] for i in range(7)]
    assert seen == [True, False, False, True, False, False, True]


def test_requests_keep_their_slot_wherever_their_row_is() -> None:
    schedule = RefreshSchedule(4, refresh_interval=8)
    (a, _), (b, _) = schedule.step([decode("a", 10), decode("b", 20)])
    assert schedule.step([decode("b", 21), decode("a", 11)]) == [(b, False), (a, False)]


def test_what_is_set_back_starts_afresh() -> None:
    schedule = RefreshSchedule(4, refresh_interval=8)
    schedule.step([decode("a", 10)])
    assert freshness(schedule, decode("a", 12)) == [True]  # a step is missing
    assert freshness(schedule, decode("a", 12)) == [True]  # the same step again
    assert freshness(schedule, decode("a", 13)) == [False]
    schedule.step([SequenceStep("a", 14, decoding=False)])
    assert schedule.num_alive == 0
    assert freshness(schedule, decode("a", 15)) == [True]
    schedule.forget(["a"])
    assert freshness(schedule, decode("a", 16)) == [True]


def test_slots_are_given_on_and_never_shared() -> None:
    schedule = RefreshSchedule(2, refresh_interval=8)
    schedule.step([decode("a", 1), decode("b", 1)])
    decisions = schedule.step([decode("c", 1), decode("b", 2)])  # a waits and loses its slot
    assert [fresh for _, fresh in decisions] == [True, False]
    assert sorted(slot for slot, _ in decisions) == [0, 1]
    assert schedule.num_alive == 2
    schedule.forget(["b", "c", "never seen"])
    assert schedule.num_alive == 0


def test_requests_that_take_turns_keep_their_selections() -> None:
    """The batches of a pipeline: nobody who waits gives way while there are slots for all."""
    schedule = RefreshSchedule(4, refresh_interval=8)
    names = ("ab", "cd")
    seen = [
        freshness(schedule, *(decode(name, 10 + turn) for name in names[i]))
        for turn in range(3)
        for i in range(2)
    ]
    assert seen == [[True, True]] * 2 + [[False, False]] * 4


def test_rows_without_a_request_leave_nothing_behind() -> None:
    schedule = RefreshSchedule(2, refresh_interval=8)
    assert schedule.step([SequenceStep(None, 5, True)] * 3) == [(-1, True)] * 3
    assert schedule.num_alive == 0


class Engine:
    """Requests with keys in pages, and one layer's selections."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.k = torch.randn(count * 8, PAGE, 2, 16, generator=generator)
        self.index = build_index(self.k, backend="reference")
        self.schedule = RefreshSchedule(count, CONFIG.refresh_interval)
        self.selections = RequestSelections(count)
        self.lengths = [150 + 37 * i for i in range(count)]

    def layout(self, rows: list[int]) -> BatchLayout:
        table = torch.tensor([[8 * i + p for p in range(8)] for i in rows], dtype=torch.int32)
        lens = torch.tensor([self.lengths[i] for i in rows], dtype=torch.int32)
        return BatchLayout(table, lens, torch.arange(len(rows) + 1, dtype=torch.int32))

    def step(self, rows: list[int]) -> tuple[torch.Tensor, BatchLayout, list[tuple[int, bool]]]:
        for i in rows:
            self.lengths[i] += 1
        q = torch.randn(
            len(rows), 4, 16, generator=torch.Generator().manual_seed(sum(self.lengths))
        )
        decisions = self.schedule.step([decode(str(i), self.lengths[i]) for i in rows])
        return q, self.layout(rows), decisions


@settings(max_examples=6)
@given(st.lists(st.permutations(range(4)), min_size=1, max_size=8), st.data())
def test_every_row_uses_its_own_selection(orders: list[list[int]], data: st.DataObject) -> None:
    engine, held = Engine(4), {}
    for order in orders:
        rows = order[: data.draw(st.integers(1, 4))]
        q, layout, decisions = engine.step(rows)
        plan = StepPlan.make(layout, RULE, decisions)
        selection = engine.selections.select(q, engine.index, plan, Search(CONFIG, "reference"))
        now = select_blocks(q, engine.index, layout, config=CONFIG, backend="reference")
        for row, (request, (_, fresh)) in enumerate(zip(rows, decisions, strict=True)):
            if fresh:
                held[request] = (now.indices[row], now.window_start[row])
            assert torch.equal(selection.indices[row], held[request][0])
            assert torch.equal(selection.window_start[row], held[request][1])


def addresses(plan: object) -> list[int]:
    layout = plan.layout  # type: ignore[attr-defined]
    tensors = (plan.slots, plan.refresh, layout.query_blocks(CONFIG.query_block_size))  # type: ignore[attr-defined]
    return [tensor.data_ptr() for tensor in tensors]


def test_captured_plans_keep_their_addresses_and_give_the_same_selections() -> None:
    """A graph replays launches: what they read has to lie where it lay, with the same shapes."""
    plain, captured = Engine(4), Engine(4)
    buffers = DecodeBuffers(4, torch.device("cpu"))
    seen: list[list[int]] = []
    for rows in ([0, 1, 2], [2, 0, 1], [1, 2, 3], [3, 1, 0], [0, 3, 2], [2, 3, 0]):
        q, layout, decisions = plain.step(rows)
        plan = StepPlan.make(layout, RULE, decisions)
        expected = plain.selections.select(q, plain.index, plan, Search(CONFIG, "reference"))
        q, layout, decisions = captured.step(rows)
        replayed = buffers.plan(layout, RULE, decisions)
        got = captured.selections.select(q, captured.index, replayed, Search(CONFIG, "reference"))
        assert torch.equal(got.indices, expected.indices)
        assert torch.equal(got.window_start, expected.window_start)
        assert torch.equal(replayed.layout.query_blocks(16), plan.layout.query_blocks(16))
        assert replayed.refresh.tolist() == [int(fresh) for _, fresh in decisions]
        seen.append([*addresses(replayed), captured.selections.indices.data_ptr()])
    assert all(one == seen[0] for one in seen)


def test_padding_rows_of_captured_plans_have_no_query_and_nobodys_slot() -> None:
    buffers = DecodeBuffers(4, torch.device("cpu"))
    table = torch.zeros(4, 2, dtype=torch.int32)
    lens = torch.tensor([70, 80, 0, 0], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    plan = buffers.plan(BatchLayout(table, lens, starts), RULE, [(3, True), (1, False)])
    assert plan.slots.tolist() == [3, 1, 4, 4]
    assert plan.refresh.tolist() == [1, 0, 0, 0]
    assert plan.layout.query_blocks(16).tolist() == [
        [0, 0, 1, 69],
        [1, 1, 1, 79],
        [2, 2, 0, 0],
        [3, 2, 0, 0],
    ]


def test_steps_of_several_rows_are_one_query_block_each() -> None:
    """Rows that verify drafts; without decisions nothing is kept, and no decision is copied."""
    buffers = DecodeBuffers(4, torch.device("cpu"))
    buffers.slots.fill_(-7)
    table = torch.zeros(3, 2, dtype=torch.int32)
    lens = torch.tensor([70, 33, 0], dtype=torch.int32)
    starts = torch.tensor([0, 3, 6, 6], dtype=torch.int32)
    plan = buffers.plan(BatchLayout(table, lens, starts), RULE)
    assert plan.layout.query_blocks(16).tolist() == [[0, 0, 3, 67], [1, 3, 3, 30], [2, 6, 0, 0]]
    assert buffers.slots.tolist() == [-7] * 4


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 200), st.booleans()), min_size=1),
    st.data(),
)
def test_rows_that_verify_drafts_lie_where_the_device_says(
    sequences: list[tuple[int, int, bool]], data: st.DataObject
) -> None:
    """The host's lengths count drafts that were rejected; those of a prompt are right."""
    rows = [n for n, _, _ in sequences]
    ends = [n + before for n, before, _ in sequences]
    whole = [drafts for _, _, drafts in sequences]
    known = [end + data.draw(st.integers(0, 4)) * drafts for end, (_, _, drafts) in zip(
        ends, sequences, strict=True
    )]  # fmt: skip
    starts = [sum(rows[:i]) for i in range(len(rows) + 1)]
    table = torch.zeros(len(rows), 1, dtype=torch.int32)
    lens, cu = (torch.tensor(x, dtype=torch.int32) for x in (ends, starts))
    layout, host = split_batch(BatchLayout(table, lens, cu, lengths=(known, starts)), 16, whole)
    exact = BatchLayout(table, lens, cu).query_blocks(16).tolist()
    blocks = layout.query_blocks(16).tolist()
    for i, drafts in enumerate(whole):
        mine = [block for block in blocks if block[0] == i]
        if drafts:
            assert mine == [[i, starts[i], rows[i], ends[i] - rows[i]]]
        else:
            assert mine == [block for block in exact if block[0] == i]
    shift = [known[i] - ends[i] for i, *_ in blocks]
    seen = [[*b[:3], b[3] + more] for b, more in zip(blocks, shift, strict=True)]
    assert host.tolist() == seen


def test_plans_without_decisions_select_everywhere() -> None:
    engine = Engine(2)
    q, layout, _ = engine.step([0, 1])
    plan = StepPlan.make(layout, RULE)
    selection = engine.selections.select(q, engine.index, plan, Search(CONFIG, "reference"))
    now = select_blocks(q, engine.index, layout, config=CONFIG, backend="reference")
    assert torch.equal(selection.indices, now.indices)
    assert not engine.selections.indices.numel()
