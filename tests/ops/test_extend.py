"""Rows beyond the trained length see what they read at consecutive positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backends import every_backend, using
from hipserve import ArgumentError, HiPConfig
from hipserve.ops import block_sparse_attention, select_blocks
from hipserve.ops.rope import nearest_segment, segment_length, turn
from hipserve.ops.select_blocks.spec import search_spec
from hipserve.plan import BatchLayout, pruning_rule
from hipserve.testing.cases import Case, Pages, Shape, attend, in_pages, make_case, make_rope
from hipserve.testing.oracle import Reading, bound, read_by
from hipserve.types import BlockSelection

TRAINED = 512
STREAM = HiPConfig(
    budget=64,
    num_sink_tokens=16,
    sliding_window=32,
    dense_below=0,
    decode_dense_below=0,
    extend="stream",
    trained_length=TRAINED,
)
NONE = STREAM.replace(extend="none", trained_length=None)
SHAPE = Shape((1400, 700, 300), (130, 1, 90), group_size=3, page_size=256)
LAYOUTS = ("halves", "neighbours", "partial")


def rope_like(layout: str, head_dim: int = 64) -> Tensor:
    """`[2, head_dim]`: pairs as Llama, GLM and Phi have them."""
    count = head_dim // 4 if layout == "partial" else None
    return make_rope(head_dim, count, neighbours=layout == "neighbours")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_turn_is_a_rotation_of_each_pair(layout: str) -> None:
    rope, x = rope_like(layout), torch.randn(64, dtype=torch.float64)
    first, second = (0, 1) if layout == "neighbours" else (0, 32 if layout == "halves" else 16)
    got = turn(x, torch.tensor(3), rope)
    angle = torch.tensor(3.0, dtype=torch.float64)  # the fastest pair turns by 1 a position
    a, b = x[first], x[second]
    pair = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
    torch.testing.assert_close(got[[first, second]], pair, rtol=0, atol=1e-8)
    torch.testing.assert_close(got.norm(), x.norm())
    if layout == "partial":
        assert torch.equal(got[32:], x[32:])


@pytest.mark.parametrize("position", [100, 30_000, 1_000_000])
def test_turns_add_up(position: int) -> None:
    rope, x = rope_like("halves"), torch.randn(64, dtype=torch.float64)
    both = turn(turn(x, position, rope), -position + 7, rope)
    torch.testing.assert_close(both, turn(x, 7, rope), rtol=0, atol=1e-12)


def test_far_segments_are_seen_from_the_nearest() -> None:
    assert segment_length(8192) == 2048
    assert segment_length(131_072) == 32_768
    assert segment_length(10_000) == 2048
    assert nearest_segment(8191, 7600, 8192) == 0
    assert nearest_segment(8192, 7616, 8192) == 2 * 2048
    assert nearest_segment(40_000, 39_424, 8192) == 18 * 2048


def turned_case(dtype: torch.dtype, rope: Tensor, shape: Shape = SHAPE) -> tuple[Case, Case]:
    """A batch in its pages, and the same with its queries and keys turned by their positions."""
    plain = make_case(shape, STREAM.index_form)
    ks = [turn(k.double(), torch.arange(len(k))[:, None], rope).to(dtype) for k in plain.ks]
    positions = torch.cat(
        [torch.arange(n - r, n) for n, r in zip(shape.seq_lens, shape.query_lens, strict=True)]
    )
    q = turn(plain.q.double(), positions[:, None], rope).to(dtype)
    vs = [v.to(dtype) for v in plain.vs]
    kv, layout = in_pages(ks, vs, Shape(**{**vars(shape), "dtype": dtype}), STREAM.index_form)
    return plain, Case(shape, q, ks, vs, kv, layout)


def attend_consecutively(
    plain: Case, selection: BlockSelection, rope: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """From keys that were never turned: those that a block reads, one behind the other.

    Returns:
        the output in float64 and in `dtype`, `[rows, num_q_heads, head_dim]`, of one block after
        the other, all rows of which lie beyond the trained length or within it.
    """
    outs: list[tuple[Tensor, Tensor]] = []
    for i, (seq, row, rows, position) in enumerate(plain.layout.query_blocks(64).tolist()):
        k, v, last = plain.ks[seq], plain.vs[seq], position + rows
        parts: list[tuple[Tensor, Tensor]] = []
        for head in range(plain.q.shape[1]):
            index_head = head * selection.indices.shape[1] // plain.q.shape[1]
            read = read_by(selection, i, index_head, last, STREAM).nonzero().flatten()
            seen = torch.arange(last - len(read), last) if position >= TRAINED else read
            at = torch.arange(position, last)
            q = turn(plain.q[row : row + rows, head].double(), at, rope)[:, None]
            kv_head = head * k.shape[1] // plain.q.shape[1]
            keys = turn(k[read, kv_head].double(), seen, rope)[:, None]
            mask = (read <= at[:, None])[None]
            reading = Reading(q, keys, v[read, kv_head][:, None].double(), mask)
            both = reading.attend(torch.float64).out, reading.attend(dtype).out
            parts.append(both)
        outs.append(tuple(torch.cat(x, 1) for x in zip(*parts, strict=True)))  # pyright: ignore
    truth, rounded = (torch.cat(x) for x in zip(*outs, strict=True))
    return truth, rounded


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_sees_its_keys_at_consecutive_positions(
    backend: str, layout: str, dtype: torch.dtype
) -> None:
    rope = rope_like(layout)
    plain, case = turned_case(dtype, rope)
    options: dict[str, Any] = {"config": STREAM, "rope": rope}
    selection = select_blocks(case.q, case.index, case.layout, backend="reference", **options)
    with using(backend) as name:
        out, _ = block_sparse_attention(
            case.q, case.pool, case.layout, selection, backend=name, **options
        )
    truth, rounded = attend_consecutively(plain, selection, rope, dtype)
    band = torch.finfo(dtype).eps * max(v.abs().max().item() for v in plain.vs)
    error, allowed = bound(out, rounded, truth, band)
    assert error <= 2 * allowed  # a key is rounded as it is stored and as it is turned


@every_backend
@pytest.mark.parametrize("code_bits", [16, 8, 4])
@pytest.mark.parametrize("selector", ["bound", "tree"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_searches_agree_on_what_lies_far(
    backend: str, code_bits: int, selector: str, layout: str
) -> None:
    config = STREAM.replace(code_bits=code_bits, selector=selector)
    case, rope = make_case(SHAPE, config.index_form), rope_like(layout)
    options: dict[str, Any] = {"config": config, "rope": rope}
    expected = select_blocks(case.q, case.index, case.layout, backend="reference", **options)
    with using(backend) as name:
        got = select_blocks(case.q, case.index, case.layout, backend=name, **options)
    assert torch.equal(got.indices, expected.indices)
    if backend == "reference":
        plain = config.replace(extend="none")
        unmoved = select_blocks(case.q, case.index, case.layout, config=plain, backend="reference")
        within = case.layout.query_blocks(64)[:, 3] < TRAINED
        assert torch.equal(got.indices[within], unmoved.indices[within])
        assert not torch.equal(got.indices[~within], unmoved.indices[~within])


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_half_precision_are_rounded_as_they_are_turned(
    backend: str, dtype: torch.dtype
) -> None:
    config = STREAM.replace(query_stride=1, bound_reach=0.5)
    shape = Shape((1400, 700), (130, 1), group_size=4, head_dim=96, page_size=256, dtype=dtype)
    case = make_case(shape, config.index_form)
    options: dict[str, Any] = {"config": config, "rope": rope_like("neighbours", 96)}
    expected = select_blocks(case.q, case.index, case.layout, backend="reference", **options)
    with using(backend) as name:
        got = select_blocks(case.q, case.index, case.layout, backend=name, **options)
    assert torch.equal(got.indices, expected.indices)


@every_backend
@pytest.mark.parametrize("rows", [1, 40])
def test_searches_agree_over_more_segments_than_a_kernel_keeps(backend: str, rows: int) -> None:
    config = STREAM.replace(trained_length=352, num_sink_tokens=16, code_bits=8)
    assert 5300 // segment_length(352) > 80
    case = make_case(Shape((5300,), (rows,), page_size=256), config.index_form)
    options: dict[str, Any] = {"config": config, "rope": rope_like("halves")}
    expected = select_blocks(case.q, case.index, case.layout, backend="reference", **options)
    with using(backend) as name:
        got = select_blocks(case.q, case.index, case.layout, backend=name, **options)
    assert torch.equal(got.indices, expected.indices)


def test_a_far_key_is_found_where_it_would_be_trained() -> None:
    """A query that looks 200 positions back finds the key there, and one that its segment moves
    there; not the same key 200 behind another place."""
    rope, position = rope_like("halves"), 2799
    wanted, moved = position - 200, position - 200 - 5 * segment_length(2 * TRAINED)
    unit, ks = torch.randn(64).double(), torch.randn(2800, 1, 64).double() / 10
    for at in (wanted, moved, moved + 77):
        ks[at, 0] = unit * 8
    keys = turn(ks, torch.arange(2800)[:, None], rope).float()
    q = turn(unit, position - 200, rope).float()[None, None]
    shape = Shape((2800,), (1,), num_kv_heads=1, group_size=1, page_size=256)
    kv, layout = in_pages([keys], [keys], shape, STREAM.index_form)
    config = STREAM.replace(budget=32, trained_length=2 * TRAINED)
    found = select_blocks(q, kv.index, layout, config=config, rope=rope, backend="reference")
    assert found.indices.flatten().tolist() == [moved // 16, wanted // 16]


def whole(config: HiPConfig, rope: Tensor, backend: str, chunk: int) -> Tensor:
    """`[700, num_q_heads, head_dim]`: a prompt of 700 tokens, in chunks."""
    case = make_case(Shape((700,), (700,), page_size=256, dtype=torch.bfloat16), config.index_form)
    outs: list[Tensor] = []
    for start in range(0, 700, chunk):
        end = min(start + chunk, 700)
        layout = BatchLayout.of(case.layout.block_table, [end], [end - start])
        kv: Pages = case.kv
        outs.append(attend(case.q[start:end], kv, layout, config, backend=backend, rope=rope)[0])
    return torch.cat(outs)


@every_backend
def test_rows_within_the_trained_length_are_as_without(backend: str) -> None:
    rope = rope_like("halves")
    with using(backend) as name:
        streamed, plain = (whole(config, rope, name, 700) for config in (STREAM, NONE))
        in_chunks = whole(STREAM, rope, name, 192)
    assert torch.equal(streamed[:TRAINED], plain[:TRAINED])
    assert not torch.equal(streamed[TRAINED:], plain[TRAINED:])
    torch.testing.assert_close(in_chunks, streamed, rtol=0, atol=2**-7)


def test_rows_beyond_the_trained_length_are_pruned_wherever_dense_attention_ends() -> None:
    rule = STREAM.replace(dense_below=100_000)
    layout = make_case(SHAPE).layout
    starts = layout.window_starts(pruning_rule(rule, "cpu"))
    beyond = layout.query_blocks(64)[:, 3] >= TRAINED
    assert bool((starts[beyond] > 16).all())
    assert bool((starts[~beyond] == 16).all())
    never = pruning_rule(STREAM, "cpu").dense_within()
    assert torch.equal(layout.window_starts(never) > 16, beyond)


def test_a_step_within_the_trained_length_searches_as_without() -> None:
    assert search_spec(STREAM) == search_spec(NONE)
    assert search_spec(STREAM, moved=True).trained_length == TRAINED


@pytest.mark.parametrize(
    ("changes", "rope", "names"),
    [
        ({}, None, "rope"),
        ({"trained_length": None}, rope_like("halves"), "trained_length"),
        ({}, rope_like("halves", 32), "rope"),
        ({"trained_length": 300}, rope_like("halves"), "352 or more"),
    ],
)
def test_what_streaming_needs(changes: dict[str, Any], rope: Tensor | None, names: str) -> None:
    case, config = make_case(SHAPE), STREAM.replace(**changes)
    with pytest.raises(ArgumentError, match=names):
        select_blocks(case.q, case.index, case.layout, config=config, rope=rope)
