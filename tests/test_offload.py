"""Offloaded keys and values: the same numbers as beside the model, bit for bit; named errors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor

from hipserve import ArgumentError, FitError, HiPCache, HiPConfig, Offload
from hipserve.attention import AttentionLayer, SelectionReuse
from hipserve.attention.crossover import rule_of
from hipserve.cache import OffloadedLayers, PagedLayer, offload
from hipserve.cache.host import MappedFile, PinnedMemory
from hipserve.cache.mapped import MappedPages
from hipserve.cache.staging import Staging
from hipserve.cache.tiles import TILED_ROWS, TiledPages, row_tiles
from hipserve.config import IndexForm
from hipserve.offload import slot_bytes
from hipserve.plan import BatchLayout, PruningRule
from hipserve.types import BlockSelection, KeyIndex, KeyPool
from tiny_models import PRUNED, build, prompts

CODED: dict[str, Any] = {"code_bits": 4, "rerank": 8}
CONFIG = HiPConfig(
    budget=64,
    num_sink_tokens=16,
    sliding_window=32,
    query_block_size=16,
    dense_below=0,
    decode_dense_below=0,
    **CODED,
)
HEADS, GROUP, DIM, PAGE = 2, 2, 32, 64


@dataclass
class Written:
    """The keys of a `PagedLayer` as an attention layer takes them: appended already."""

    pages: PagedLayer
    query_lens: list[int]
    fresh: None = None

    def append(self) -> None:
        """Done before."""

    @property
    def layout(self) -> BatchLayout:
        return self.pages.layout(self.query_lens)

    @property
    def index(self) -> KeyIndex:
        return self.pages.index

    def fetch(
        self,
        selection: BlockSelection | None,
        layout: BatchLayout,
        config: HiPConfig,
        rule: PruningRule | None,
    ) -> KeyPool:
        return self.pages.fetch(selection, layout, config, rule)


def mapped(path: Path, nbytes: int | str = "64MiB", config: HiPConfig = CONFIG) -> PagedLayer:
    layers = OffloadedLayers(Offload(nbytes, file=path), 1, config)
    return PagedLayer(PAGE, *config.index_form, layers.make_store)


def keys(batch: int, new: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, new, HEADS, DIM).to(device)
    return k, v


def indexed(pages: PagedLayer, seq: int) -> list[Tensor]:
    """What the index says about the keys of a sequence, and of their runs that are whole."""
    length, table = pages.lengths[seq], pages.layout([1] * len(pages.lengths)).block_table[seq]
    positions = torch.arange(length, device=table.device)
    runs = positions[: length // 16]
    at = table[positions // PAGE].long(), positions % PAGE
    of_run = table[runs * 16 // PAGE].long(), runs % (PAGE // 16)
    index = pages.index
    rows = [index.codes[at], index.code_scales[at], index.summaries[of_run]]  # type: ignore
    return [*rows, index.summary_scales[of_run]]  # type: ignore[index]


class OffloadedEqualsResident(RuleBasedStateMachine):
    """Any history of a batch: what offloaded layers hold and return is what resident ones do."""

    backend, device = "auto", "cpu"

    def make(self) -> PagedLayer:
        raise NotImplementedError

    @initialize(batch=st.integers(1, 3), interval=st.sampled_from([1, 4]))
    def start(self, batch: int, interval: int) -> None:
        torch.manual_seed(0)
        self.config = CONFIG.replace(refresh_interval=interval)
        self.resident = PagedLayer(PAGE, *CONFIG.index_form)
        self.layers = [self.resident, self.make()]
        self.reuse = [SelectionReuse(), SelectionReuse()]
        self.batch = batch

    @rule(new=st.sampled_from([1, 1, 1, 17, 150]))
    def append(self, new: int) -> None:
        k, v = keys(self.batch, new, self.device)
        q = torch.randn(self.batch * new, HEADS * GROUP, DIM).to(self.device)
        answers: list[tuple[Tensor, ...]] = []
        for pages, reuse in zip(self.layers, self.reuse, strict=True):
            pages.append(k, v)
            layer = AttentionLayer(
                self.config, rule_of(self.config, q, HEADS), selections=reuse, backend=self.backend
            )
            out = layer.forward(q, Written(pages, [new] * self.batch))
            kept = reuse.selection
            answers.append((*out, *((kept.indices, kept.window_start) if kept else ())))
        for expected, got in zip(*answers, strict=True):
            assert torch.equal(expected, got)
        for seq in range(self.batch):
            for expected, got in zip(*(indexed(p, seq) for p in self.layers), strict=True):
                assert torch.equal(expected, got)

    @precondition(lambda self: bool(self.resident.lengths))
    @rule(data=st.data(), batch=st.integers(1, 4))
    def branch(self, data: Any, batch: int) -> None:
        self.reorder([data.draw(st.integers(0, self.batch - 1)) for _ in range(batch)])

    def reorder(self, order: list[int]) -> None:
        for pages, reuse in zip(self.layers, self.reuse, strict=True):
            pages.reorder(torch.tensor(order))
            reuse.reorder(torch.tensor(order, device=self.device))
        self.batch = len(order)

    @precondition(lambda self: bool(self.resident.lengths))
    @rule(count=st.integers(1, 90))
    def truncate(self, count: int) -> None:
        for pages, reuse in zip(self.layers, self.reuse, strict=True):
            pages.truncate(count)
            reuse.clear()

    @rule(batch=st.integers(1, 3))
    def clear(self, batch: int) -> None:
        for pages, reuse in zip(self.layers, self.reuse, strict=True):
            pages.clear()
            reuse.clear()
        self.batch = batch


def test_a_mapped_file_is_as_good_as_memory(tmp_path: Path) -> None:
    class Machine(OffloadedEqualsResident):
        def make(self) -> PagedLayer:
            return mapped(tmp_path / "kv")

    machine: Any = Machine.TestCase
    machine.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
    machine("runTest").runTest()


def tiled(slots: int, backend: str) -> PagedLayer:
    """Everything that a GPU does, in the memory of a CPU, poisoned."""

    def make_store(page_size: int, form: IndexForm, k: Tensor) -> TiledPages:
        memory, staging = PinnedMemory(2**23, pinned=k.is_cuda), Staging(page_size, k)
        memory.tensor().view(torch.float32).fill_(torch.nan)
        store = TiledPages(
            page_size,
            form,
            k,
            memory=memory,
            device_bytes=slots * slot_bytes(HEADS, DIM, 4),
            staging=staging,
            floor=row_tiles(CONFIG),
            backend=backend,
        )
        store.arena.tiles.fill_(torch.nan)
        return store

    return PagedLayer(PAGE, *CONFIG.index_form, make_store)


class TiledEqualsResident(OffloadedEqualsResident):
    """The same with tiles; entries of the table may be forgotten at any time."""

    backend = "reference"
    slots = 0

    def make(self) -> PagedLayer:
        return tiled(self.slots, self.backend)

    @precondition(lambda self: bool(self.resident.lengths))
    @rule(share=st.floats(0, 1))
    def forget(self, share: float) -> None:
        where = self.layers[1].store.arena.where  # type: ignore[attr-defined]
        where[torch.rand(where.shape) < share] = -1


@pytest.mark.parametrize("room", [1.0, 1.01, 2.0])
def test_tiles_are_as_good_as_pages(room: float) -> None:
    class Machine(TiledEqualsResident):
        slots = int(4 * row_tiles(CONFIG.replace(refresh_interval=4)) * room)

    machine: Any = Machine.TestCase
    machine.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)
    machine("runTest").runTest()


@pytest.mark.parametrize("kind", ["tiles", "file"])
def test_pages_made_in_inference_mode_can_be_written_later(kind: str, tmp_path: Path) -> None:
    pages = tiled(40, "reference") if kind == "tiles" else mapped(tmp_path / "kv")
    resident = PagedLayer(PAGE, *CONFIG.index_form)
    rows = [keys(1, new) for new in (150, 1, 150)]
    for i, (k, v) in enumerate(rows):
        for layer in (pages, resident):
            with torch.inference_mode(i == 0):
                layer.append(k, v)
    pages.reorder(torch.tensor([0, 0]))
    pages.append(*keys(2, 1))
    resident.reorder(torch.tensor([0, 0]))
    resident.append(*keys(2, 1))
    for expected, got in zip(indexed(resident, 1)[:2], indexed(pages, 1)[:2], strict=True):
        assert torch.equal(expected[:301], got[:301])


def test_layers_that_are_alike_share_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PinnedMemory", lambda n: PinnedMemory(n, pinned=False))
    layers = OffloadedLayers(Offload("24MiB", "12MiB"), 3, CONFIG)
    wide = torch.empty(1, HEADS, 2 * DIM)
    stores = [layers._tiled(PAGE, CONFIG.index_form, k) for k in (wide, keys(1, 1)[0], wide)]
    staged = [store._staging for store in stores]  # type: ignore[attr-defined]
    assert staged[0] is staged[2] is not staged[1]
    assert [store.arena.num_slots for store in stores] == [  # type: ignore[attr-defined]
        2**22 // slot_bytes(HEADS, dim, 4) for dim in (2 * DIM, DIM, 2 * DIM)
    ]
    with pytest.raises(ArgumentError, match="page_size in steps of 16, the keys of a tile"):
        layers._tiled(PAGE + 8, CONFIG.index_form, wide)


def test_loads_are_counted_and_memory_is_split() -> None:
    pages = tiled(40, "reference")
    pages.append(*keys(1, 700))
    assert pages.count_loads() == (0, 0)
    rows: list[tuple[int, int]] = []
    for _ in range(3):
        pages.append(*keys(1, 1))
        q = torch.randn(1, HEADS * GROUP, DIM)
        layer = AttentionLayer(CONFIG, rule_of(CONFIG, q, HEADS), backend="reference")
        layer.forward(q, Written(pages, [1]))
        rows.append(pages.count_loads())
    needed, loaded = rows[-1]
    assert rows[0][0] == rows[0][1] > 0  # the first step finds nothing
    assert needed == 3 * rows[0][0] > loaded > rows[0][1]
    page = 2 * HEADS * PAGE * DIM * 4
    assert pages.host_nbytes % page == 0
    assert pages.host_nbytes >= 703 // PAGE * page
    assert pages.device_nbytes > 40 * 2 * HEADS * 16 * DIM * 4


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_more_rows_than_tiles_serve_read_staged_pages(rows: int) -> None:
    """Resident rows of that many have another kernel on Hopper, which rounds differently."""
    pages = tiled(1000, "reference")
    pages.append(*keys(1, 700))
    pages.append(*keys(1, rows))
    q = torch.randn(rows, HEADS * GROUP, DIM)
    config = CONFIG.replace(query_block_size=64)
    layer = AttentionLayer(config, rule_of(config, q, HEADS), backend="reference")
    layer.forward(q, Written(pages, [rows]))
    assert (pages.count_loads()[0] > 0) == (rows <= TILED_ROWS)


def test_arenas_that_are_too_small_say_what_is_needed() -> None:
    floor = row_tiles(CONFIG)
    assert floor == 1 + 4 + 3
    with pytest.raises(FitError, match=r"reads 8 tiles of a head, 64\.25 KiB in this layer"):
        tiled(floor - 1, "reference").append(*keys(1, 3))
    pages = tiled(floor, "reference")
    pages.append(*keys(2, 300))
    q = torch.randn(2, HEADS * GROUP, DIM)
    layer = AttentionLayer(CONFIG, rule_of(CONFIG, q, HEADS), backend="reference")
    pages.append(*keys(2, 1))
    with pytest.raises(FitError, match="2 rows that read 8 tiles of a head each, 1 times"):
        layer.forward(q, Written(pages, [1, 1]))


@pytest.mark.parametrize("option", [{}, {"num_beams": 3}, {"prefill_chunk_size": 48}])
def test_a_model_answers_from_a_file_what_it_answers_from_memory(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    model = build("llama", {**PRUNED, **CODED})
    ids, options = prompts(2), {"max_new_tokens": 12, "do_sample": False, **option}
    resident = HiPCache(model.config)
    offloaded = HiPCache(model.config, offload=Offload("96MiB", file=tmp_path))
    expected = model.generate(ids, past_key_values=resident, **options)
    assert torch.equal(model.generate(ids, past_key_values=offloaded, **options), expected)
    assert offloaded.count_keys() == resident.count_keys()
    assert offloaded.nbytes == offloaded.host_nbytes + offloaded.device_nbytes
    assert resident.host_nbytes == 0 < offloaded.device_nbytes < resident.device_nbytes
    assert not list(tmp_path.iterdir())


def test_layers_that_are_never_pruned_stay_resident(tmp_path: Path) -> None:
    model = build("llama", {**PRUNED, **CODED, "dense_layers": 1})
    cache = HiPCache(model.config, offload=Offload("96MiB", file=tmp_path / "kv"))
    model.generate(prompts(1), past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert [layer.pages.host_nbytes > 0 for layer in cache.layers] == [False, True, True]


class Asked:
    """Memory that only notes what it is asked for."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def will_need(self, ranges: list[tuple[int, int]]) -> None:
        self.ranges += ranges


def test_what_a_decode_step_reads_is_asked_for_at_once(tmp_path: Path) -> None:
    pages = mapped(tmp_path / "kv")
    pages.append(*keys(1, 400))
    store = pages.store
    assert isinstance(store, MappedPages)
    store._memory = asked = Asked()  # type: ignore[assignment]
    indices = torch.tensor([[[3, 4, 9], [20, -1, -1]]], dtype=torch.int32)
    layout = pages.layout([1])
    pages.fetch(BlockSelection(indices, torch.tensor([352]).int()), layout, CONFIG, None)
    read = torch.zeros(int(layout.block_table.max()) + 1, HEADS, 2, PAGE // 16, dtype=torch.bool)
    row, table = 16 * DIM * 4, layout.block_table[0].tolist()
    for begin, end in asked.ranges:
        assert begin % row == end % row == 0
        read.view(-1)[begin // row : end // row] = True
    expected = torch.zeros_like(read)
    for head, blocks in enumerate(([0, 3, 4, 9], [0, 20])):  # the sinks, the chosen
        for block in [*blocks, 22, 23, 24]:  # the window
            expected[table[block // 4], head, :, block % 4] = True
    assert torch.equal(read, expected)
    asked.ranges.clear()
    pages.fetch(None, layout, CONFIG, None)
    whole = sum(end - begin for begin, end in asked.ranges)
    assert whole == len(table) * HEADS * 2 * PAGE * DIM * 4


def test_a_search_that_reads_keys_is_refused(tmp_path: Path) -> None:
    config = build("llama").config
    config.hip = {"budget": 32}
    with pytest.raises(ArgumentError, match='"code_bits": 4, "rerank": 8'):
        HiPCache(config, offload=Offload("64MiB", file=tmp_path / "kv"))


def test_a_cpu_needs_a_file() -> None:
    layers = OffloadedLayers(Offload("64MiB"), 1, CONFIG)
    pages = PagedLayer(PAGE, *CONFIG.index_form, layers.make_store)
    with pytest.raises(ArgumentError, match="expected a file"):
        pages.append(*keys(1, 3))


def test_more_keys_than_there_is_room_for_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    pages = mapped(tmp_path / "kv", "2MiB")
    k, v = keys(1, 2000)
    pages.append(k, v)
    before = pages.lengths, pages.pool.k_cache[0].clone()
    with pytest.raises(FitError, match="host_memory has room for 4096 in every layer"):
        pages.append(*keys(1, 3000))
    assert pages.lengths == before[0] == [2000]
    assert torch.equal(pages.pool.k_cache[0], before[1])
    pages.append(*keys(1, 2000))
    with pytest.raises(FitError, match="a page of a layer takes 32 KiB"):
        MappedPages(PAGE, CONFIG.index_form, k, MappedFile(tmp_path, 2**14).stretch(0, 2**14))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = mapped(tmp_path / "kv")
    pages.append(*keys(1, 3))

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FitError, match="the disk is full after 2 MiB of this layer's keys"):
        pages.append(*keys(1, 5000))
    assert pages.lengths == [3]
    monkeypatch.undo()
    pages.append(*keys(1, 5000))
    assert pages.lengths == [5003]
