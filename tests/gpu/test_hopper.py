"""Which calls the attention kernel for Hopper takes; that it is right, `benchmarks/gpu.py` checks.

Its language has no interpreter, so only a card runs it.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from hipserve.cache.tiles import TILED_ROWS
from hipserve.platform import specialises_warps, triton_library

if triton_library():
    pytest.skip(triton_library(), allow_module_level=True)

import triton

from hipserve.ops.block_sparse_attention.triton import launch
from hipserve.ops.block_sparse_attention.triton.hopper.shape import can_copy, make_shape
from hipserve.ops.block_sparse_attention.triton.tiling import Call

CALL = Call(
    q_shape=torch.Size([4096, 32, 128]),
    k_shape=torch.Size([64, 256, 8, 128]),
    longest=64 * 256,
    blocks=64,
    selected=torch.Size([64, 8, 64]),
    max_rows=64,
    num_sink_tokens=64,
    key_block_size=16,
    windowed=False,
    capped=False,
    same_strides=True,
    tiled=False,
    streams=False,
    converted=False,
    element_size=2,
    device=torch.device("cuda"),
)
REFUSED: dict[str, dict[str, Any]] = {
    "decode": {"max_rows": 1},
    "few rows": {"max_rows": 16},
    "large query blocks": {"max_rows": 128},
    "float32": {"element_size": 4},
    "a model's own window": {"windowed": True},
    "softcap": {"capped": True},
    "pages in fp8": {"converted": True},
    "tiles of keys in host memory": {"tiled": True},
    "small key blocks": {"key_block_size": 8},
    "sinks that are no runs of 16": {"num_sink_tokens": 8},
    "pages that are no power of two": {"k_shape": torch.Size([64, 48, 8, 128])},
    "small pages": {"k_shape": torch.Size([64, 8, 8, 128])},
    "wide heads": {"q_shape": torch.Size([4096, 32, 256])},
    "a selection for each query head": {"selected": torch.Size([64, 32, 64])},
}


def test_rows_that_read_tiles_have_the_same_kernel_resident() -> None:
    assert make_shape(CALL) is not None
    assert make_shape(CALL._replace(max_rows=TILED_ROWS)) is None


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_stay_with_the_kernel_for_every_gpu(case: str) -> None:
    assert make_shape(CALL._replace(**REFUSED[case])) is None


@pytest.mark.parametrize(("heads", "tiles"), [(16, 1), (24, 2), (32, 2), (56, 4)])
def test_a_pair_of_heads_is_an_item_of_work(heads: int, tiles: int) -> None:
    shape = make_shape(CALL._replace(q_shape=torch.Size([4096, heads, 128])))
    assert shape is not None
    assert (shape.group_size, shape.head_tiles) == (heads // 8, tiles)


def test_block_sizes_do_not_matter_where_everything_is_read() -> None:
    shape = make_shape(CALL._replace(selected=None, key_block_size=2, num_sink_tokens=3))
    assert shape is not None
    assert not shape.selected


def test_what_the_copy_engine_takes() -> None:
    x = torch.zeros(8, 4, 64, dtype=torch.bfloat16)
    wide = torch.zeros(8, 4, 72 + 4, dtype=torch.bfloat16)
    assert can_copy(x, x.half(), x.transpose(0, 1), wide[:, :1, :64].contiguous())
    assert not can_copy(x, x.float())
    assert not can_copy(wide[..., :64])  # rows 152 bytes apart
    assert not can_copy(x[..., 4:])  # starts 8 bytes behind a multiple of 16
    assert not can_copy(x.transpose(1, 2))
    assert not can_copy(x[:0])
    assert not can_copy(x[:1, :1].expand(8, 4, 64))


def test_a_hopper_takes_it_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.Size] = []

    def attend(*inputs: Any, **_: Any) -> None:
        taken.append(inputs[0].shape)

    class Nothing:
        def __getitem__(self, grid: object) -> Any:
            return lambda *_, **__: None

    monkeypatch.setattr(launch, "attention_kernel", Nothing())
    monkeypatch.setattr(launch, "hopper_attention", lambda: attend)
    q = torch.zeros(64, 8, 64, dtype=torch.bfloat16)
    pages = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16)
    table, blocks = torch.zeros(1, 1).int(), torch.tensor([[0, 0, 64, 0]], dtype=torch.int32)
    sizes = {"num_sink_tokens": 0, "key_block_size": 16, "sliding_window": 0}
    for hopper in (False, True):
        monkeypatch.setattr(launch, "specialises_warps", lambda _, hopper=hopper: hopper)
        for sm_scale in (0.1, -0.1):
            launch.block_sparse_attention(
                *(q, pages, pages, table, blocks, None, None),
                **sizes,
                sm_scale=sm_scale,
                v_scale=1.0,
                softcap=0.0,
                query_block_size=64,
                lists=None,
                rope=None,
                trained_length=0,
                page_size=64,
            )
    assert taken == [q.shape]


def test_only_a_hopper_with_a_known_triton_gives_warps_roles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def specialises(capability: tuple[int, int], version: str) -> bool:
        specialises_warps.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(triton, "__version__", version)
        assert not specialises_warps(torch.device("cpu"))
        return specialises_warps(torch.device("cuda"))

    assert specialises((9, 0), "3.6.0")
    for capability, version in (
        ((9, 0), "3.7.1"),
        ((9, 0), "3.60.0"),
        ((9, 0), "4.0.0"),
        ((8, 9), "3.6.0"),
        ((10, 0), "3.6.0"),
    ):
        assert not specialises(capability, version)
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.hopper", None)
    assert not specialises((9, 0), "3.6.0"), "a build without the language"
    specialises_warps.cache_clear()
