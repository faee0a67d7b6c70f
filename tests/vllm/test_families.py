"""Families of models inside vLLM's engine, requests that are not greedy text alone, and keys that
reach a request by other ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import scenarios

pytest.importorskip("vllm")

DENSE_AND_FULL = ("dense cache", "full cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def ran(folder: Path) -> dict[str, dict[str, Any]]:
    names = ("families", "features", "hybrids", "found")
    return scenarios(*names, folder=folder, HIPSERVE_TEST_MODELS=str(folder / "models"))


@pytest.fixture(scope="module")
def found(ran: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return ran["found"]


def test_families_answer_as_with_dense_attention(ran: dict[str, dict[str, Any]]) -> None:
    """`sinks=None`, chunks, pages of other layers with fast prefill, learned sinks."""
    families = ran["families"]
    windowed = {"gemma2", "gemma3", "mistral"}
    assert set(families) == {"granite", "llama4", "gemma3n", "gptoss"} | windowed
    for name, seen in families.items():
        assert seen["full"] == seen["dense"], name


def test_other_requests_are_answered_as_with_dense_attention(
    ran: dict[str, dict[str, Any]],
) -> None:
    """Log-probabilities, seeded samples, beams, an adapter, embeddings."""
    dense, full = ran["features"]["dense"], ran["features"]["full"]
    for name in ("tokens", "likeliest", "samples", "beams", "adapter"):
        assert full[name] == dense[name], name
    assert full["adapter"] != full["plain"] == dense["plain"]
    for name, count in (("prompt", 1365), ("embeddings", 5 * 384)):
        assert len(full[name]) == count
        assert full[name] == pytest.approx(dense[name], rel=1e-4, abs=1e-5)


def test_urgent_requests_come_first_and_the_others_lose_nothing(
    ran: dict[str, dict[str, Any]],
) -> None:
    assert ran["features"]["prioritised"]["preemptions"] > 0
    assert ran["features"]["prioritised"]["answers"] == ran["features"]["in any order"]


def test_hybrids_keep_their_cache(ran: dict[str, dict[str, Any]]) -> None:
    """Blocks as large as a recurrent state: bounds take their 7 %, rounding some more, no half."""
    assert set(ran["hybrids"]) == {"qwen3next_wide", "granite_hybrid", "falcon_h1"}
    for name, seen in ran["hybrids"].items():
        dense, full = (seen[key]["block"] * seen[key]["blocks"] for key in DENSE_AND_FULL)
        assert full >= 0.8 * dense, name


@pytest.mark.parametrize("name", ["granite_hybrid", "falcon_h1"])
def test_hybrids_answer_as_with_dense_attention(name: str, ran: dict[str, dict[str, Any]]) -> None:
    """Granite 4 H and Falcon H1: Mamba layers among or beside full ones."""
    seen = ran["hybrids"][name]
    assert len({tuple(tokens) for tokens in seen["dense"]}) == len(seen["dense"]) > 5
    assert seen["full"] == seen["dense"]


def test_bounds_of_copied_blocks_are_those_of_their_keys(found: dict[str, Any]) -> None:
    hits = found["partial hits"]
    assert hits["copies"] > 0
    assert hits["found"] >= 1024
    assert hits["runs"] > 0
    assert hits["wrong"] == 0


def test_keys_that_a_connector_brings_serve_as_well(found: dict[str, Any]) -> None:
    seen = found["connector"]
    assert found["first"] == found["again"] == found["without connector"]
    assert seen["found"] >= 2 * 1024
    assert seen["runs"] > 0
    assert seen["wrong"] == 0


def test_vllm_frees_the_cache_that_it_measured_graphs_with(found: dict[str, Any]) -> None:
    assert found["freed"]
