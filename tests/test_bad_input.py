"""Bad input: each gets one sentence that names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hipserve
from hipserve import ArgumentError, BackendError, ConfigError, HiPConfig
from hipserve.ops import block_sparse_attention, build_index, select_blocks, write_kv
from hipserve.plan import BatchLayout
from hipserve.types import BlockSelection, KeyIndex, KeyPool

Q, K = torch.zeros(1, 4, 4, 64), torch.zeros(1, 8, 2, 64)
HIP: dict[str, Any] = {"q": Q, "k": K, "v": K}


def refused(argument: str, call: Callable[[], object]) -> str:
    with pytest.raises(ArgumentError) as error:
        call()
    assert error.value.argument == argument
    message = str(error.value)
    assert "expected" in message
    assert "got" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("q", {"q": "tensor"}),
        ("q", {"q": None}),
        ("q", {"q": Q.int()}),
        ("q", {"q": Q[0]}),
        ("q", {"q": torch.zeros(1, 4, 3, 64)}),
        ("q", {"q": torch.zeros(1, 4, 4, 32)}),
        ("q", {"q": Q.transpose(2, 3).contiguous().transpose(2, 3)}),
        ("k", {"k": K.half()}),
        ("k", {"k": K.to("meta")}),
        ("k", {"k": K[:, :3], "v": K[:, :3]}),
        ("k", {"k": K.expand(2, -1, -1, -1), "v": K.expand(2, -1, -1, -1)}),
        ("v", {"v": K[:, :7]}),
        ("v", {"v": K.double()}),
        ("causal", {"causal": False}),
        ("config", {"config": {"budget": 1}}),
        ("config", {"config": {}}),
        ("sm_scale", {"sm_scale": math.nan}),
        ("sm_scale", {"sm_scale": -1.0}),
        ("sm_scale", {"sm_scale": "1"}),
        ("softcap", {"softcap": -1.0}),
        ("softcap", {"softcap": math.inf}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_hip_attention(argument: str, changes: dict[str, Any]) -> None:
    refused(argument, lambda: hipserve.hip_attention(**{**HIP, **changes}))


def test_a_backend_that_cannot_run_says_why() -> None:
    meta = {name: x.to("meta") for name, x in HIP.items()}
    with pytest.raises(BackendError, match=r"cpu.*cannot run: the tensors are on meta"):
        hipserve.hip_attention(**meta, backend="cpu")
    wide = {name: x.double() for name, x in HIP.items()}
    with pytest.raises(BackendError, match="not float64"):
        hipserve.hip_attention(**wide, backend="cpu")


def paged(**changes: Any) -> dict[str, Any]:
    pages = torch.zeros(3, 64, 2, 64)
    fields: dict[str, Any] = {
        "block_table": torch.tensor([[0, 1], [2, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([100, 20], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 3, 5], dtype=torch.int32),
        "q": torch.zeros(5, 4, 64),
        "k_cache": pages,
        "v_cache": pages,
        "summaries": torch.zeros(3, 5, 2, 2, 64),
        **changes,
    }
    layout = BatchLayout(fields["block_table"], fields["seq_lens"], fields["cu_seqlens_q"])
    pool = KeyPool(fields["k_cache"], fields["v_cache"])
    index = KeyIndex(fields["k_cache"], fields["summaries"])
    return {"q": fields["q"], "pool": pool, "index": index, "layout": layout}


def searched(**changes: Any) -> dict[str, Any]:
    """What `select_blocks` takes."""
    return {name: x for name, x in paged(**changes).items() if name != "pool"}


def attended(**changes: Any) -> dict[str, Any]:
    """What `block_sparse_attention` takes."""
    return {name: x for name, x in paged(**changes).items() if name != "index"}


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("block_table", {"block_table": ints([0, 3], [2, 0])}),
        ("block_table", {"block_table": ints([0, -1], [2, 0])}),
        ("block_table", {"block_table": ints([0], [2])}),
        ("block_table", {"block_table": ints([0, 1])}),
        ("block_table", {"block_table": ints([0, 1], [2, 0]).long()}),
        ("seq_lens", {"seq_lens": ints(2, 20)}),
        ("seq_lens", {"seq_lens": ints(100, -20)}),
        ("seq_lens", {"seq_lens": torch.tensor([100.0, 20.0])}),
        ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 3, 4)}),
        ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 6, 5)}),
        ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 5)}),
        ("q", {"q": torch.zeros(5, 3, 64)}),
        ("codes", {"k_cache": torch.zeros(3, 64, 2, 64, dtype=torch.bfloat16)}),
        ("summaries", {"summaries": None}),
        ("summaries", {"summaries": torch.zeros(3, 4, 2, 2, 64)}),
    ],
)
def test_select_blocks(argument: str, changes: dict[str, Any]) -> None:
    refused(argument, lambda: select_blocks(**searched(**changes)))


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("k_cache", {"k_cache": torch.zeros(3, 64, 2, 64, dtype=torch.bfloat16)}),
        ("v_cache", {"v_cache": torch.zeros(3, 32, 2, 64)}),
    ],
)
def test_pages_that_do_not_fit(argument: str, changes: dict[str, Any]) -> None:
    refused(argument, lambda: block_sparse_attention(**attended(**changes)))


def test_an_index_of_other_runs_or_of_another_kind_is_refused() -> None:
    fields = searched()
    refused(
        "index", lambda: select_blocks(**fields, config=hipserve.HiPConfig(bound_block_size=32))
    )
    refused("index", lambda: select_blocks(**{**fields, "index": KeyPool(K, K)}))
    refused("pool", lambda: block_sparse_attention(**{**attended(), "pool": fields["index"]}))


def test_pages_that_runs_would_straddle() -> None:
    pages, bounds = torch.zeros(3, 80, 2, 64), torch.zeros(3, 7, 2, 2, 64)
    odd = searched(k_cache=pages, v_cache=pages, summaries=bounds)
    refused("page_size", lambda: select_blocks(**odd))


@pytest.mark.parametrize(
    ("argument", "selection", "options"),
    [
        ("selection.indices", (torch.zeros(2, 2, 4), ints(64, 20)), {}),
        ("selection.indices", (torch.zeros(3, 2, 4).int(), ints(64, 20)), {}),
        ("selection.indices", (torch.zeros(2, 3, 4).int(), ints(64, 20)), {}),
        ("selection.indices", (torch.full((2, 2, 4), 99).int(), ints(64, 20)), {}),
        ("selection.indices", (torch.full((2, 2, 4), 2).int(), ints(96, 20)), {}),
        ("selection.window_start", (torch.zeros(2, 2, 4).int(), ints(64)), {}),
        ("selection.window_start", (torch.zeros(2, 2, 4).int(), ints(-5, 20)), {}),
        ("selection.window_start", (torch.zeros(2, 2, 4).int(), ints(64, 65)), {}),
        ("sliding_window", (torch.zeros(2, 2, 4).int(), ints(64, 20)), {"sliding_window": 5}),
        ("sliding_window", None, {"sliding_window": -1}),
        ("sm_scale", None, {"sm_scale": math.inf}),
        ("softcap", None, {"softcap": math.nan}),
    ],
)
def test_block_sparse_attention(argument: str, selection: Any, options: dict[str, Any]) -> None:
    chosen = BlockSelection(*selection) if selection else None
    refused(argument, lambda: block_sparse_attention(**attended(), selection=chosen, **options))


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("k", {"k": torch.zeros(5, 3, 64)}),
        ("k", {"k": torch.zeros(5, 2, 32)}),
        ("v", {"v": torch.zeros(4, 2, 64)}),
        ("v", {"v": torch.zeros(5, 2, 64).half()}),
        ("slot_mapping", {"slot_mapping": torch.arange(4)}),
        ("slot_mapping", {"slot_mapping": torch.arange(5).int()}),
        ("slot_mapping", {"slot_mapping": torch.arange(5) + 190}),
        ("slot_mapping", {"slot_mapping": torch.arange(5) - 3}),
    ],
)
def test_write_kv(argument: str, changes: dict[str, Any]) -> None:
    k = torch.zeros(5, 2, 64)
    fields, pages = {"k": k, "v": k, "slot_mapping": torch.arange(5), **changes}, paged()
    refused(argument, lambda: write_kv(**fields, pool=pages["pool"], index=pages["index"]))


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_sizes_of_bounds(size: Any) -> None:
    refused("run_size", lambda: build_index(K, run_size=size))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget", 0),
        ("budget", 8),
        ("budget", 1000),
        ("budget", math.nan),
        ("budget", "1k"),
        ("budget", True),
        ("budget", 2**31),
        ("selector", "quest"),
        ("representative", None),
        ("query_block_size", 0),
        ("query_stride", 65),
        ("key_block_size", -1),
        ("bound_block_size", 15),
        ("rerank", -1),
        ("bound_reach", math.nan),
        ("bound_reach", 1.5),
        ("share_group", 1),
        ("num_sink_tokens", 7),
        ("sliding_window", 0),
        ("dense_layers", [-1]),
        ("dense_layers", "all"),
        ("dense_layers", 2.5),
        ("refresh_interval", 0),
        ("seed", -1),
    ],
)
def test_config_fields(field: str, value: object) -> None:
    message = refused(field, lambda: HiPConfig.from_dict({field: value}))
    assert repr(value) in message


@pytest.mark.parametrize(
    ("field", "value"), [("selector", "tree+bound"), ("bound_share", 0.5), ("bound_share", None)]
)
@pytest.mark.parametrize("make", [HiPConfig, HiPConfig().replace, HiPConfig.preset])
def test_the_selectors_of_earlier_versions_are_refused_by_name(
    make: Callable[..., HiPConfig], field: str, value: object
) -> None:
    start = ("fast",) if make == HiPConfig.preset else ()
    message = refused(field, lambda: make(*start, **{field: value}))
    assert repr(value) in message
    assert "is gone" in message
    assert 'use selector="bound"' in message


def test_config_keys_and_files(tmp_path: Path) -> None:
    refused("budgte", lambda: HiPConfig.from_dict({"budgte": 1}))
    refused("preset", lambda: HiPConfig.preset("none"))
    refused("config", lambda: HiPConfig.load(tmp_path / "missing.toml"))
    for name, text in (
        ("a.toml", "budget = "),
        ("a.json", "{"),
        ("b.json", "[1]"),
        ("c.json", "\xff"),
    ):
        path = tmp_path / name
        path.write_bytes(text.encode("latin-1"))
        refused("config", lambda path=path: HiPConfig.load(path))


def test_config_survives_its_files(tmp_path: Path) -> None:
    config = HiPConfig(budget=512, selector="tree", dense_layers=2, bound_reach=0.25)
    for form in ("toml", "json"):
        path = tmp_path / f"config.{form}"
        path.write_text(config.dumps(form))
        assert HiPConfig.load(path) == config
    assert config.dense_layers == (0, 1)
    assert HiPConfig.preset("paper").dense_layers == (0, 1, 2)
    with pytest.raises(ConfigError):
        config.replace(nonsense=1)
    with pytest.raises(AttributeError):
        config.budget = 5
