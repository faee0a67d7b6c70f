"""vLLM with keys and values in host memory: the answers of those beside the model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import BLOCK_BYTES
from processes import scenarios

from hipserve import ConfigError, FitError

pytest.importorskip("vllm")

ARENAS = ("floor", "room", "graphs")
SCRIPT = Path(__file__).with_name("hosting.py")


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hosting")
    return scenarios("hosted", folder=folder, script=SCRIPT)["hosted"]


def tokens(answers: list[list[list[float]]]) -> list[list[int]]:
    return [[int(token) for token, _ in answer] for answer in answers]


def likelihoods(answers: list[list[list[float]]]) -> list[float]:
    return [likelihood for answer in answers for _, likelihood in answer]


@pytest.mark.parametrize("arena", ARENAS)
def test_offloaded_equals_resident(hosted: dict[str, Any], arena: str) -> None:
    """Prompts in chunks, in company, and found again. Torch computes resident rows that read
    everything, and rounds differently."""
    for steps in ("", ", found"):
        ours, theirs = hosted[f"{arena}{steps}"], hosted[f"resident{steps}"]
        assert tokens(ours) == tokens(theirs)
        assert likelihoods(ours) == pytest.approx(likelihoods(theirs), abs=2e-5)


@pytest.mark.parametrize("arena", ARENAS)
def test_blocks_that_are_used_again_show_no_earlier_keys(
    hosted: dict[str, Any], arena: str
) -> None:
    """Short of blocks: every one had several owners, preempted ones among them."""
    assert hosted[f"{arena}, preemptions"] > 0
    assert tokens(hosted[f"{arena}, preempted"]) == tokens(hosted["resident"])


def test_steps_are_cut_into_parts_that_fit(hosted: dict[str, Any]) -> None:
    assert hosted["floor, parts"] > hosted["room, parts"] > 1


def test_decode_steps_that_fit_are_those_of_a_graph(hosted: dict[str, Any]) -> None:
    """Between steps that are not: what those leave on the device is out of date afterwards."""
    assert not any(hosted["floor, replayed"] + hosted["room, replayed"])
    replayed = hosted["graphs, replayed"]
    assert 10 < sum(replayed) < len(replayed)


@pytest.mark.parametrize("arena", ARENAS)
def test_builders_of_the_same_layers_count_once(hosted: dict[str, Any], arena: str) -> None:
    again = hosted[f"{arena}, made again"]
    assert again["counter"]
    assert len(set(again["slots"])) == 1
    assert again["layers"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_workers_divide_the_pool(tmp_path: Path, kind: str) -> None:
    """Two workers, each with half of the heads or of the layers: the answers of resident keys."""
    environment = {
        "HIPSERVE_TEST_PARALLEL": json.dumps({f"{kind}_parallel_size": 2}),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_CPU_CI_ENV": "1",
    }
    ran = scenarios("shared", folder=tmp_path, script=SCRIPT, **environment)["shared"]
    for ours in (ran["offloaded"], ran["offloaded, found"]):
        assert tokens(ours) == tokens(ran["resident"])
        assert likelihoods(ours) == pytest.approx(likelihoods(ran["resident"]), abs=2e-5)
    assert ran["counts"]["hipserve_pool_bytes"] == 48 * BLOCK_BYTES
    assert ran["counts"]["hipserve_tiles_loaded"] > 0


@pytest.mark.parametrize(("tensor", "stages", "own"), [(1, 1, 12), (2, 1, 12), (1, 2, 6)])
def test_blocks_are_those_of_the_host_memory_of_all_workers(
    tensor: int, stages: int, own: int
) -> None:
    from hipserve.config import HiPConfig
    from hipserve.integrations.vllm.kv_block import BlockLayout
    from hipserve.integrations.vllm.offload import check_blocks
    from hipserve.offload import Offload

    layout = BlockLayout(256, 2 // tensor, 64, torch.float32, HiPConfig(code_bits=4).index_form)
    parallel = SimpleNamespace(tensor_parallel_size=tensor, pipeline_parallel_size=stages)
    for given in (48, 49):
        engine: Any = SimpleNamespace(
            parallel_config=parallel,
            model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 12),
            cache_config=SimpleNamespace(num_gpu_blocks_override=given),
        )
        asked = engine, Offload(48 * BLOCK_BYTES), layout, own
        if given == 48:
            assert check_blocks(*asked) == 48
        else:
            with pytest.raises(ConfigError, match="hold 48 blocks"):
                check_blocks(*asked)


def test_each_gpu_has_tiles_and_the_machine_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    from hipserve.host import HostMemory
    from hipserve.integrations.vllm import settings

    def engine(**offload: Any) -> Any:
        parallel = SimpleNamespace(world_size=2, data_parallel_size=1, nnodes=1)
        return SimpleNamespace(
            additional_config={"hip": {"code_bits": 4, "offload": offload}},
            parallel_config=parallel,
            device_config=SimpleNamespace(device_type="cuda"),
            model_config=SimpleNamespace(hf_text_config=None, dtype=torch.bfloat16),
            cache_config=SimpleNamespace(cache_dtype="auto", block_size=256),
            kv_transfer_config=None,
            speculative_config=None,
        )

    given, unsaid = (
        settings.offload_of(engine(host_memory=1 << 30, **tiles))
        for tiles in ({"device_memory": 1 << 20}, {})
    )
    assert given
    assert unsaid
    assert (given.host_bytes, given.device_bytes) == (1 << 30, 1 << 20)
    assert (unsaid.host_bytes, unsaid.device_bytes) == (1 << 30, 1 << 26)
    memory = HostMemory(1 << 31, 3 << 29)
    monkeypatch.setattr(HostMemory, "read", classmethod(lambda cls: memory))
    settings.check(engine(host_memory=3 << 29))
    with pytest.raises(FitError, match=r"host_memory asks for 2 GiB, and 1\.5 GiB are available"):
        settings.check(engine(host_memory=1 << 31))  # each of both workers would fit


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"workers": 2, "copies": 2}, "got 2 copies of the model"),
        ({"workers": 4, "machines": 2}, "got workers on 2 machines"),
        ({"workers": 2, "device": "cpu"}, "got 2 worker processes"),
    ],
)
def test_workers_that_cannot_share_a_pool_are_refused(parts: dict[str, Any], said: str) -> None:
    from hipserve.config import HiPConfig
    from hipserve.integrations.vllm.limits import Engine, check_offload
    from hipserve.offload import Offload

    file = "kv" if parts.get("device") == "cpu" else None
    engine = Engine(**{"device": "cuda", "model": None, "dtype": "bfloat16", **parts})
    with pytest.raises(ConfigError, match=said):
        check_offload(Offload(1 << 30, file=file), HiPConfig(code_bits=4), engine)


def test_tiles_are_counted(hosted: dict[str, Any]) -> None:
    floor, room = (hosted[f"{arena}, counts"] for arena in ("floor", "room"))
    assert floor["hipserve_pool_bytes"] == 48 * BLOCK_BYTES
    assert 3 < room["hipserve_arena_bytes"] / floor["hipserve_arena_bytes"] < 3.6
    assert floor["hipserve_tiles_needed"] >= floor["hipserve_tiles_loaded"]
    assert floor["hipserve_tiles_loaded"] > room["hipserve_tiles_loaded"] > 0
