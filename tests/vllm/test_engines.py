"""HiP attention inside vLLM's engine: the same tokens as what it replaces."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import BLOCK_BYTES, NEW, PRUNED, prompts
from processes import get, post, scenarios, serving

from hipserve.serving.address import free_port

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def ran(folder: Path) -> dict[str, dict[str, Any]]:
    return scenarios("full", "streamed", "pruned", "offloaded", "refused", folder=folder)


@pytest.fixture(scope="module")
def full(ran: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return ran["full"]


@pytest.fixture(scope="module")
def pruned(ran: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return ran["pruned"]


def test_room_for_every_key_gives_the_tokens_of_dense_attention(full: dict[str, Any]) -> None:
    assert len(full["expected"]) >= 32
    assert full["block size"] == 256
    assert full["first"] == full["expected"]
    assert full["prefix hits"] == full["expected"]


def test_preempted_requests_give_the_same_tokens(full: dict[str, Any]) -> None:
    assert full["preemptions"] > 0
    assert full["preempted"] == full["expected"]


def test_pruned_tokens_equal_transformers(pruned: dict[str, Any]) -> None:
    assert pruned["alone"] == pruned["transformers"]
    assert pruned["counts"]["hipserve_keys_read"] < pruned["counts"]["hipserve_keys_visible"]


def test_the_meter_shows_pruned_layers(pruned: dict[str, Any]) -> None:
    """It changes no token (those of "together" are compared with metered ones of no engine)."""
    layers = {int(layer): share for layer, share in pruned["unread"].items()}
    assert sorted(layers) == [layer for layer in range(12) if layer not in (1, 4)]
    assert all(0 < share < 1 for share in layers.values())
    assert layers[0] == max(layers.values())  # nearly an average: docs/lab.md


def test_streamed_tokens_equal_transformers(ran: dict[str, dict[str, Any]]) -> None:
    """Beyond the trained length, in batches and after prefix hits."""
    report = ran["streamed"]
    assert report["together"] == report["transformers"]
    assert report["prefix hits"] == report["transformers"]
    assert report["transformers"] != report["unextended"]
    assert report["transformers"][0] == report["unextended"][0]  # 345 tokens and 16
    assert "trained_length: expected a length" in report["no length"]
    assert 'dense_layers: expected none with extend="stream"' in report["dense layers"]
    assert "rope_parameters of YaRN in --hf-overrides" in report["no yarn"]


@pytest.fixture(scope="module")
def offloaded(ran: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return ran["offloaded"]


def test_keys_in_a_file_give_the_tokens_of_keys_in_memory(
    offloaded: dict[str, Any], pruned: dict[str, Any]
) -> None:
    """In batches, after prefix hits, and after preemptions; a block holds the index only."""
    assert offloaded["together"] == pruned["together"]
    assert offloaded["prefix hits"] == pruned["together"]
    assert offloaded["preempted"] == pruned["together"]
    assert offloaded["preemptions"] > 0
    assert not offloaded["file left"]
    assert 0.05 < offloaded["block bytes"] / BLOCK_BYTES < 0.1
    counts = offloaded["counts"]
    assert counts["hipserve_pool_bytes"] == 48 * BLOCK_BYTES
    assert counts["hipserve_pool_read_bytes"] > BLOCK_BYTES
    assert counts["hipserve_pool_stalls"] >= 0


def test_the_number_of_blocks_is_what_host_memory_holds(offloaded: dict[str, Any]) -> None:
    for name, given in (("unsaid", "None"), ("too many", "49")):
        assert "num_gpu_blocks_override: expected as many KV blocks as" in offloaded[name]
        assert f"hold 48 blocks), got {given}; --num-gpu-blocks-override 48" in offloaded[name]


def test_dense_layers_stay_dense(pruned: dict[str, Any]) -> None:
    """Two of twelve; transformers keeps the same two, and the tokens are equal (above)."""
    counts = pruned["counts"]
    dense = counts["hipserve_dense_query_blocksdense_layer"]
    assert dense * 12 == counts["hipserve_query_blocks"] * 2 > 0


def test_pruned_tokens_do_not_depend_on_the_company(pruned: dict[str, Any]) -> None:
    assert pruned["together"] == pruned["alone"]
    assert pruned["prefix hits"] == pruned["alone"]


def test_bounds_are_right_in_blocks_that_were_shared_and_used_again(pruned: dict[str, Any]) -> None:
    assert pruned["bounds"]["cached"] >= 20
    assert pruned["bounds"]["wrong"] == 0


def test_selections_serve_four_steps_and_end_with_their_requests(pruned: dict[str, Any]) -> None:
    counts = pruned["counts"]
    # 15 decode rows a request: four selections and eleven reuses.
    assert counts["hipserve_refreshes"] * 11 == counts["hipserve_reuses"] * 4 > 0
    assert pruned["alive"] <= 1


def test_what_cannot_be_meant_is_refused_at_start(
    ran: dict[str, dict[str, Any]],
) -> None:
    said = ran["refused"]
    assert "budgte: expected a field of HiPConfig" in said["unknown key"]
    assert "did you mean budget?" in said["unknown key"]
    assert "refresh_interval: expected a whole number from 1 to" in said["bad value"]
    assert "additional_config: expected a table" in said["no table"]
    assert "block_size: expected a multiple of 32" in said["block size"]
    assert "kv_cache_dtype: expected float32" in said["kv dtype"]
    assert "kv_cache_dtype: expected float32" in said["other kv dtype"]
    assert "and no connector, got no file" in said["offload without a file"]
    assert "got code_bits 16, which reads the keys" in said["offload of keys"]
    assert "offload: expected a table such as" in said["no offload"]
    assert 'meter: expected "off" with offload' in said["meter of a file"]


def test_tensor_parallel_gives_the_same_tokens(pruned: dict[str, Any], folder: Path) -> None:
    assert workers(folder, tensor_parallel_size=2) == pruned["alone"]


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False])
def test_pipeline_parallel_gives_the_same_tokens(
    pruned: dict[str, Any], folder: Path, eager: bool
) -> None:
    """Neither mode warms up here (VLLM_CPU_CI_ENV), which is when vLLM has no buffer by itself."""
    together = workers(folder, pipeline_parallel_size=2, enforce_eager=eager)
    assert together == pruned["alone"]


@pytest.mark.slow
def test_compiled_models_give_the_same_tokens(pruned: dict[str, Any], folder: Path) -> None:
    together = scenarios("compiled", folder=folder)["compiled"]["together"]
    assert together == pruned["alone"]


@pytest.mark.slow
def test_traced_models_give_the_same_tokens(pruned: dict[str, Any], folder: Path) -> None:
    ran = scenarios("compiled", folder=folder, VLLM_CPU_CI_ENV="1")
    assert ran["compiled"]["together"] == pruned["alone"]


@pytest.mark.slow
def test_bfloat16_rounds_no_more_than_dense_attention_does(folder: Path) -> None:
    """Greedy tokens part after some twenty tokens, as they do between any two kernels."""
    errors = scenarios("reduced", folder=folder)["reduced"]
    assert errors["tokens"] > 10_000
    assert errors["CUSTOM"] <= 1.25 * errors["CPU_ATTN"]


@pytest.mark.slow
def test_data_parallel_gives_the_same_tokens(pruned: dict[str, Any], folder: Path) -> None:
    """Two engines behind one server, asked through it."""
    settings, port = folder / "pruned.json", free_port()
    settings.write_text(json.dumps(PRUNED))
    flags = "--dtype float32 --max-model-len 4096 --max-num-batched-tokens 512"
    flags += " --max-num-seqs 16 --kv-cache-memory-bytes 536870912 --data-parallel-size 2"
    with serving("--config", str(settings), *flags.split(), port=port, log=folder / "dp"):
        url = f"http://127.0.0.1:{port}"

        def ask(prompt: list[int]) -> list[int]:
            body = {"model": "acorn", "prompt": prompt, "max_tokens": NEW, "temperature": 0}
            more = {"ignore_eos": True, "return_token_ids": True}
            status, answer = post(f"{url}/v1/completions", {**body, **more})
            assert status == 200, answer
            return answer["choices"][0]["token_ids"]

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, prompts())) == pruned["alone"]
        counts = re.findall(r"vllm:request_success_total\{(.*)\} (.*)", get(f"{url}/metrics"))
        busy = {labels.split('engine="')[1][0] for labels, count in counts if float(count)}
        assert busy == {"0", "1"}


def workers(folder: Path, **options: Any) -> list[list[int]]:
    environment = {
        "HIPSERVE_TEST_PARALLEL": json.dumps(options),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_CPU_CI_ENV": "1",
    }
    return scenarios("parallel", folder=folder, **environment)["parallel"]["together"]
