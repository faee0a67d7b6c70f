"""Decode steps over tiles as CUDA graphs: the numbers of resident pages, bit for bit.

On a GPU each side's step is captured once and replayed; in Triton's interpreter it is called again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hipserve import HiPConfig
from hipserve.attention import AttentionLayer, RequestSelections, StepSelections
from hipserve.cache import Write
from hipserve.cache.host import PinnedMemory
from hipserve.cache.staging import Staging
from hipserve.cache.store import empty_index
from hipserve.cache.tiles import TiledPages, most_row_tiles, row_tiles
from hipserve.offload import slot_bytes
from hipserve.ops import write_kv
from hipserve.plan import (
    BatchLayout,
    CapturedPlan,
    DecodeBuffers,
    RefreshSchedule,
    SequenceStep,
    pruning_rule,
)
from hipserve.platform import interpreting
from hipserve.types import KeyIndex, KeyPool

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not (GPU or interpreting()), reason="no GPU and no interpreter")

DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
HEADS, GROUP, DIM, PAGE = 2, 4, 64, 64
PROMPTS = (300, 70, 140)
"""Keys of the sequences at first: one is pruned at once, one later, and one never is."""
CHUNK = 150
"""Rows that a sequence gets at once in between, which stage its pages."""
STEPS, EVERY = (60, 17) if GPU else (4, 3)
LONGEST = 1024
PAGES = len(PROMPTS) * LONGEST // PAGE
CONFIG = HiPConfig(
    budget=64,
    num_sink_tokens=16,
    sliding_window=32,
    query_block_size=32,
    dense_below=0,
    decode_dense_below=150,
    code_bits=4,
    rerank=8,
)


@dataclass
class Rows:
    """What a step appends and, with a plan, asks: tensors that stay where they are then.

    k, v `[num_tokens, HEADS, DIM]`, q `[num_tokens, HEADS * GROUP, DIM]`, slots `[num_tokens]`.
    """

    layout: BatchLayout
    k: Tensor
    v: Tensor
    q: Tensor
    slots: Tensor
    writes: list[Write] = field(default_factory=list[Write])
    plan: CapturedPlan | None = None


class Resident:
    """One layer, its pages beside the model: `LayerKeys` of the `rows` of a step."""

    fresh: None = None
    rows: Rows

    def __init__(self) -> None:
        shape = (PAGES, PAGE, HEADS, DIM)
        k, v = torch.zeros((2, *shape), dtype=DTYPE, device=DEVICE)
        self.pool, self.kept = KeyPool(k, v), RequestSelections(len(PROMPTS) + 1)
        self.index = empty_index(PAGES, PAGE, CONFIG.index_form, k, DEVICE)

    @property
    def layout(self) -> BatchLayout:
        return self.rows.layout

    def append(self) -> None:
        rows = self.rows
        few: dict[str, Any] = {"whole_runs": True, "apart": True} if rows.plan else {}
        pool, index = self.pool, self.index
        write_kv(rows.k, rows.v, pool, index, rows.slots, backend="triton", check=False, **few)

    def fetch(self, *_: object) -> KeyPool:
        return self.pool

    def write(self, rows: Rows) -> None:
        self.rows = rows
        self.append()

    def attend(self, rows: Rows, config: HiPConfig) -> Tensor:
        """`[num_tokens, HEADS * GROUP, DIM]`."""
        self.rows = rows
        rule = pruning_rule(config, DEVICE.type)
        kept = StepSelections(self.kept, rows.plan) if rows.plan else None
        return AttentionLayer(config, rule, selections=kept, backend="triton").forward(
            rows.q, self
        )[0]


class Tiled(Resident):
    """The same in host memory, with tiles for what rows that decode may read, and no more."""

    def __init__(self, config: HiPConfig) -> None:
        super().__init__()
        k = self.pool.k_cache
        self.most = most_row_tiles(config, pruning_rule(config, DEVICE.type), LONGEST)
        slot = slot_bytes(HEADS, DIM, DTYPE.itemsize)
        self.pages = TiledPages(
            PAGE,
            CONFIG.index_form,
            k,
            memory=PinnedMemory(2 * k.nbytes, pinned=GPU),
            device_bytes=len(PROMPTS) * self.most * slot,
            staging=Staging(PAGE, k, LONGEST // PAGE),
            floor=row_tiles(config),
            backend="triton",
        )
        self.pages.hold(PAGES)
        self.pages.arena.tiles.fill_(torch.nan)
        self.pages.index = self.index
        self.pool = self.pages.pool

    def append(self) -> None:
        rows = self.rows
        if rows.plan:
            self.pages.write_few(rows.k, rows.v, rows.slots)
        else:
            self.pages.write(rows.k, rows.v, rows.slots, rows.writes)

    def fetch(self, *asked: Any) -> KeyPool:
        selection, layout, config, _ = asked
        return self.pages.load(selection, layout, config, self.most)


class Batch:
    """Sequences that decode together, and a row that pads the batch."""

    def __init__(self, config: HiPConfig) -> None:
        torch.manual_seed(0)
        rows, count = len(PROMPTS) + 1, len(PROMPTS)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": DEVICE}
        pages = torch.randperm(PAGES).int().view(count, -1)
        self.config, self.tables, self.lengths = config, pages.tolist(), [0] * count
        self.table = torch.cat([pages, pages[:1]]).to(DEVICE)
        self.schedule = RefreshSchedule(rows, config.refresh_interval)
        self.buffers = DecodeBuffers(rows, DEVICE)
        starts = torch.tensor([*range(rows), count], **ints)
        self.fixed = Rows(
            BatchLayout(self.table, torch.zeros(rows, **ints), starts),
            *self.made(rows),
            torch.full((rows,), -1, dtype=torch.int64, device=DEVICE),
        )

    def made(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v = torch.randn(2, rows, HEADS, DIM)
        q = torch.randn(rows, HEADS * GROUP, DIM)
        return k.to(DEVICE, DTYPE), v.to(DEVICE, DTYPE), q.to(DEVICE, DTYPE)

    def slots(self, seq: int, begin: int, end: int) -> list[int]:
        return [self.tables[seq][p // PAGE] * PAGE + p % PAGE for p in range(begin, end)]

    def decode(self) -> None:
        """Makes `fixed` the next key of every sequence."""
        fixed, count = self.fixed, len(self.lengths)
        self.lengths = [n + 1 for n in self.lengths]
        for to, x in zip((fixed.k, fixed.v, fixed.q), self.made(count + 1), strict=True):
            to.copy_(x)
        slots = [self.slots(i, n - 1, n)[0] for i, n in enumerate(self.lengths)]
        fixed.slots[:count] = torch.tensor(slots)
        fixed.layout.seq_lens[:count] = torch.tensor(self.lengths).int()
        rule, keeps = pruning_rule(self.config, DEVICE.type), self.config.refresh_interval > 1
        steps = [SequenceStep(i, n, rule.prunes(n - 1, 1)) for i, n in enumerate(self.lengths)]
        decisions = self.schedule.step(steps) if keeps else None
        fixed.plan = self.buffers.plan(fixed.layout, rule, decisions)

    def chunk(self, seq: int, rows: int) -> Rows:
        """The next keys of one sequence, as a prompt brings them."""
        begin = self.lengths[seq]
        end = self.lengths[seq] = begin + rows
        layout = BatchLayout.of(self.table[seq : seq + 1], [end], [rows])
        slots = torch.tensor(self.slots(seq, begin, end)).to(DEVICE)
        writes = [Write(self.tables[seq][: -(-end // PAGE)], begin, end)]
        return Rows(layout, *self.made(rows), slots, writes)


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Launches `step` again with every call, as one graph where there is a GPU."""
    if not GPU:
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@pytest.mark.parametrize("interval", [1, 4] if GPU else [4])
def test_replayed_steps_over_tiles_equal_those_over_pages(interval: int) -> None:
    config = CONFIG.replace(refresh_interval=interval)
    batch, resident, tiled = Batch(config), Resident(), Tiled(config)
    steps: list[Callable[[], Tensor]] = []
    for side in (resident, tiled):
        steps.append(lambda side=side: side.attend(batch.fixed, config))

    def append(seq: int, count: int) -> None:
        rows = batch.chunk(seq, count)
        for side in (resident, tiled):
            side.write(rows)

    for seq, count in enumerate(PROMPTS):
        append(seq, count)
    for i in range(STEPS):
        if i == 1:  # the kernels are compiled
            steps = [captured(step) for step in steps]
        if i % EVERY == EVERY - 1:  # what this leaves on the device is out of date afterwards
            append(2 - i // EVERY % 2, CHUNK)
        batch.decode()
        tiled.pages.settle()
        expected, got = (step() for step in steps)
        real = slice(len(PROMPTS))
        assert not got[real].isnan().any()
        assert torch.equal(expected[real], got[real]), f"step {i} of {batch.lengths}"
    check_pages(batch, resident, tiled)
    needed, loaded = tiled.pages.count_loads()
    assert needed > loaded
    assert not GPU or loaded > tiled.pages.arena.num_slots * HEADS  # slots were given to others


def check_pages(batch: Batch, resident: Resident, tiled: Tiled) -> None:
    """Both sides hold the same keys, values and index."""
    tiled.pages.settle()
    if GPU:
        torch.cuda.synchronize()
    for seq, length in enumerate(batch.lengths):
        at = torch.tensor(batch.slots(seq, 0, length))
        page, slot = at // PAGE, at % PAGE
        for name in ("k_cache", "v_cache"):
            expected, got = (getattr(side.pool, name).cpu() for side in (resident, tiled))
            assert torch.equal(expected[page, slot], got[page, slot]), name
        assert torch.equal(codes_of(resident.index, at), codes_of(tiled.index, at))


def codes_of(index: KeyIndex, at: Tensor) -> Tensor:
    """Of the keys in the slots `at` `[n]`."""
    return index.codes.cpu()[at // PAGE, at % PAGE]
