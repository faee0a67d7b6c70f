"""vLLM with keys and values in host memory: the answers of those beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import BLOCK_BYTES
from processes import scenarios

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


def test_tiles_are_counted(hosted: dict[str, Any]) -> None:
    floor, room = (hosted[f"{arena}, counts"] for arena in ("floor", "room"))
    assert floor["hipserve_pool_bytes"] == 48 * BLOCK_BYTES
    assert 3 < room["hipserve_arena_bytes"] / floor["hipserve_arena_bytes"] < 3.6
    assert floor["hipserve_tiles_needed"] >= floor["hipserve_tiles_loaded"]
    assert floor["hipserve_tiles_loaded"] > room["hipserve_tiles_loaded"] > 0
