"""Loading tiles: the clock in exact order, every tile once; what is resident equals its page."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from hipserve import ArgumentError, HiPConfig
from hipserve.offload import TILE_SIZE
from hipserve.ops import block_sparse_attention, load_tiles, select_blocks, store_rows
from hipserve.ops.load_tiles.reference import give_up
from hipserve.plan import BatchLayout, DecodeBuffers, pruning_rule
from hipserve.platform import interpreting
from hipserve.testing.cases import Case, Shape, make_case
from hipserve.types import BlockSelection, KeyPool, TileArena

BACKENDS = ["reference", *(["triton"] if interpreting() else [])]
backends = pytest.mark.parametrize("backend", BACKENDS)
CONFIG = HiPConfig(
    budget=64,
    sliding_window=32,
    num_sink_tokens=16,
    query_block_size=16,
    dense_below=0,
    decode_dense_below=0,
    code_bits=4,
)


def pages_of(pool: KeyPool) -> Tensor:
    """`[num_pages, num_kv_heads, 2, page_size, head_dim]`."""
    return torch.stack([pool.k_cache, pool.v_cache], dim=2).permute(0, 3, 2, 1, 4).contiguous()


def arena_of(case: Case, slots: int) -> TileArena:
    pages, size = case.pool.k_cache.shape[:2]
    arena = TileArena.empty(slots, pages * size // TILE_SIZE, case.pool.k_cache)
    arena.tiles.fill_(torch.nan)
    return arena


def copied(arena: TileArena) -> TileArena:
    return TileArena(**{name: getattr(arena, name).clone() for name in TileArena.__slots__})


def assert_whole(arena: TileArena, pages: Tensor) -> None:
    """The table and the owners are inverse, and what is resident equals its page."""
    per_page = pages.shape[3] // TILE_SIZE
    for head in range(arena.tiles.shape[0]):
        for tile in (arena.where[head] >= 0).nonzero()[:, 0].tolist():
            slot = int(arena.where[head, tile])
            assert arena.owner[head, slot] == tile
            rows = slice(tile % per_page * TILE_SIZE, (tile % per_page + 1) * TILE_SIZE)
            expected = pages[tile // per_page, head, :, rows]
            assert torch.equal(arena.tiles[head, slot].nan_to_num(), expected.nan_to_num())
        assert arena.where[head].max() < arena.num_slots
        assert arena.where[head].min() >= -1


def case_of(seed: int, share_group: bool = True) -> tuple[Case, HiPConfig]:
    rng = random.Random(seed)
    lengths = tuple(rng.choice([1, 40, 300, 517]) for _ in range(rng.randint(1, 3)))
    shape = Shape(
        lengths,
        tuple(1 for _ in lengths),
        num_kv_heads=rng.choice([1, 2]),
        head_dim=rng.choice([16, 32]),
        kind="grid",
        seed=seed,
    )
    config = CONFIG.replace(
        share_group=share_group,
        key_block_size=rng.choice([16, 32]),
        bound_block_size=32,
        num_sink_tokens=32,
    )
    return make_case(shape, config.index_form), config


def chosen(case: Case, config: HiPConfig, seed: int) -> BlockSelection:
    """What is read with other queries."""
    q = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(seed))
    return select_blocks(q, case.index, case.layout, config=config, backend="reference")


CASES = [("reference", seed, room) for seed in range(8) for room in (1.0, 1.01, 2.0)]
CASES += [("triton", seed, 1 + seed % 2) for seed in range(4) if interpreting()]


@pytest.mark.parametrize(("backend", "seed", "room"), CASES)
def test_attention_over_tiles_equals_attention_over_pages(
    backend: str, seed: int, room: float
) -> None:
    case, config = case_of(seed, share_group=seed % 2 > 0)
    pages, group = pages_of(case.pool), case.shape.group_size if seed % 2 == 0 else 1
    needed = len(case.shape.seq_lens) * group * 34
    arena = arena_of(case, int(needed * room))
    for step in range(3):
        selection = chosen(case, config, step) if step < 2 else None
        if selection is None and needed < 34 * 3:
            break
        options: dict[str, Any] = {"config": config, "backend": backend}
        pool = load_tiles(arena, pages, case.layout, selection, max_tiles=34, **options)
        expected = block_sparse_attention(case.q, case.pool, case.layout, selection, **options)
        got = block_sparse_attention(case.q, pool, case.layout, selection, **options)
        for x, y in zip(expected, got, strict=True):
            assert torch.equal(x, y)
        assert_whole(arena, pages)


@pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("seed", range(4))
def test_triton_takes_the_slots_that_the_definition_takes(seed: int) -> None:
    case, config = case_of(seed)
    pages, needed = pages_of(case.pool), len(case.shape.seq_lens) * 34
    arena = arena_of(case, needed + seed)
    for step in range(5):
        selection = chosen(case, config, step)
        other = copied(arena)
        options: dict[str, Any] = {"config": config, "max_tiles": 34}
        expected = load_tiles(arena, pages, case.layout, selection, backend="reference", **options)
        got = load_tiles(other, pages, case.layout, selection, backend="triton", **options)
        assert expected.lists is not None
        assert got.lists is not None
        assert torch.equal(expected.lists.slots, got.lists.slots)
        for name in TileArena.__slots__:
            x, y = getattr(arena, name), getattr(other, name)
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), name
        if step % 3 == 2:  # a tile that was forgotten costs a load
            arena.where[torch.rand(arena.where.shape) < 0.3] = -1


@backends
def test_forgotten_tiles_only_cost_loads(backend: str) -> None:
    case, config = case_of(2)
    pages, arena = pages_of(case.pool), arena_of(case, 140)
    for step in range(6):
        selection = chosen(case, config, step % 2)
        options: dict[str, Any] = {"config": config, "backend": backend}
        pool = load_tiles(arena, pages, case.layout, selection, max_tiles=34, **options)
        expected = block_sparse_attention(case.q, case.pool, case.layout, selection, **options)[0]
        got = block_sparse_attention(case.q, pool, case.layout, selection, **options)[0]
        assert torch.equal(expected, got)
        arena.where[torch.rand(arena.where.shape) < 0.5] = -1
    needed, loaded = arena.counts.sum(0).tolist()
    assert 0 < loaded < needed


@backends
def test_rows_are_written_to_pages_and_tiles(backend: str) -> None:
    case, config = case_of(3)
    pages, arena = pages_of(case.pool), arena_of(case, 140)
    load_tiles(
        arena,
        pages,
        case.layout,
        chosen(case, config, 0),
        config=config,
        max_tiles=34,
        backend=backend,
    )
    size, heads, dim = pages.shape[3], pages.shape[1], pages.shape[4]
    slots = torch.randperm(pages.shape[0] * size)[:150]
    slots[7] = -1
    k, v = torch.randn(2, 150, heads, dim)
    store_rows(k, v, arena, pages, slots, backend=backend)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(pages[slot // size, :, 0, slot % size], k[token])
            assert torch.equal(pages[slot // size, :, 1, slot % size], v[token])
    assert_whole(arena, pages)


@backends
def test_room_behind_the_lists_and_rows_that_pad_a_batch_change_nothing(backend: str) -> None:
    """A captured step has room for the longest list of any step, and rows without a request."""
    case, config = case_of(1)
    pages, narrow = pages_of(case.pool), arena_of(case, 140)
    wide = copied(narrow)
    real, padded = len(case.shape.seq_lens), 3
    layout = padded_layout(case, padded)
    plan = DecodeBuffers(real + padded, torch.device("cpu")).plan(
        layout, pruning_rule(config, "cpu")
    )
    options: dict[str, Any] = {"config": config, "backend": backend}
    for step in range(3):
        selection = chosen(case, config, step)
        last = torch.arange(real + padded).clamp(max=real - 1)  # chosen blocks read nothing there
        pool = load_tiles(narrow, pages, case.layout, selection, max_tiles=34, **options)
        of_graph = load_tiles(
            wide, pages, plan.layout, selection.rows(last), max_tiles=1536, check=False, **options
        )
        assert pool.lists is not None
        assert of_graph.lists is not None
        slots = pool.lists.slots
        read = torch.arange(34) < num_tiles(case, config, selection)[..., None]
        assert torch.equal(of_graph.lists.slots[:real, :, :34][read], slots[read])
        for name in TileArena.__slots__:
            x, y = getattr(narrow, name), getattr(wide, name)
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), name
        expected = block_sparse_attention(case.q, pool, case.layout, selection, **options)
        got = block_sparse_attention(
            case.q, of_graph, case.layout, selection, check=False, **options
        )
        for x, y in zip(expected, got, strict=True):
            assert torch.equal(x, y)


def padded_layout(case: Case, count: int) -> BatchLayout:
    """The batch with sequences behind it that have no row, but a length."""
    layout = case.layout
    table = torch.cat([layout.block_table, layout.block_table[:1].repeat(count, 1)])
    ends = torch.cat([layout.seq_lens, layout.seq_lens[:1].repeat(count)])
    starts = torch.cat([layout.cu_seqlens_q, layout.cu_seqlens_q[-1:].repeat(count)])
    return BatchLayout(table, ends, starts)


@backends
def test_long_lists_that_are_looked_at_together_load_every_tile_once(backend: str) -> None:
    lengths = (37, 2100, 1, 40, 300, 2, 3, 16)
    case = make_case(Shape(lengths, (1,) * 8, num_kv_heads=1, head_dim=16), CONFIG.index_form)
    pages, count = pages_of(case.pool), sum(-(-n // TILE_SIZE) for n in lengths)
    arena, per_page = arena_of(case, count), pages.shape[3] // TILE_SIZE
    for _ in range(2):
        pool = load_tiles(
            arena, pages, case.layout, config=CONFIG, max_tiles=256, check=False, backend=backend
        )
        assert pool.lists is not None
        for seq, length in enumerate(lengths):
            tile = torch.arange(-(-length // TILE_SIZE))
            page = case.layout.block_table[seq, tile // per_page]
            slots = pool.lists.slots[seq, 0, : len(tile)].long()
            assert torch.equal(arena.owner[0, slots], (page * per_page + tile % per_page).int())
        assert_whole(arena, pages)
    assert arena.counts.tolist() == [[2 * count, count]]


def num_tiles(case: Case, config: HiPConfig, selection: BlockSelection) -> Tensor:
    """`[num_query_blocks, heads]`: tiles of every list."""
    ends = case.layout.seq_lens[:, None]
    sinks = ends.clamp(max=config.num_sink_tokens)
    window = selection.window_start[:, None].minimum(ends).maximum(sinks)
    keys = (selection.indices >= 0).sum(2) * config.key_block_size
    return -(-(sinks + keys + ends - window) // TILE_SIZE)


def test_the_hand_passes_over_what_was_read_since_it_came_by() -> None:
    stamp = torch.tensor([3, 5, 0, 2, 0])
    assert give_up(stamp, step=5, hand=0) == (2, 3)
    assert stamp.tolist() == [0, 5, 0, 2, 0]
    stamp[2] = 5
    assert give_up(stamp, step=5, hand=3) == (4, 0)
    stamp[4] = 5
    assert give_up(stamp, step=5, hand=0) == (0, 1)
    assert stamp.tolist() == [0, 5, 5, 0, 5]


def test_arenas_below_their_floor_and_odd_blocks_are_refused() -> None:
    case, config = case_of(2)
    pages, selection = pages_of(case.pool), chosen(case, config, 0)
    with pytest.raises(ArgumentError, match=r"arena: expected .* slots a head or more"):
        load_tiles(arena_of(case, 20), pages, case.layout, selection, config=config, max_tiles=34)
    odd = config.replace(key_block_size=8, bound_block_size=8, num_sink_tokens=8)
    with pytest.raises(ArgumentError, match="a multiple of 16, the keys of a tile"):
        load_tiles(arena_of(case, 140), pages, case.layout, selection, config=odd, max_tiles=34)
    small = arena_of(case, 140)
    with pytest.raises(ArgumentError, match="pages: expected"):
        load_tiles(small, pages[:1], case.layout, selection, config=config, max_tiles=34)
