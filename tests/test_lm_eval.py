"""lm-eval's own command with HiP attention, on tasks that need no download."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hipserve.errors import ConfigError
from hipserve.integrations import lm_eval as bridge
from hipserve.models import bundled_path

installed = pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed, nor is it in CI"
)
TASKS = Path(__file__).parents[1] / "examples" / "lm_eval"
PRUNES = "dense_below=0,decode_dense_below=0,sliding_window=64,num_sink_tokens=16"


def answers(
    monkeypatch: pytest.MonkeyPatch, folder: Path, model: str, options: str
) -> dict[str, list[Any]]:
    """What `model` answers in each task; two documents of 1,024 tokens."""
    command = ["lm_eval", "--model", model, "--device", "cpu"]
    command += ["--model_args", f"pretrained={bundled_path()},dtype=float32,{options}"]
    command += ["--include_path", str(TASKS), "--apply_chat_template", "--log_samples"]
    command += ["--tasks", "hipserve_needles,hipserve_needles_likelihood"]
    command += ["--metadata", json.dumps({"length": 1024, "documents": 2})]
    monkeypatch.setattr(sys, "argv", [*command, "--output_path", str(folder)])
    bridge.main()
    return {
        path.name.removeprefix("samples_").rsplit("_", 1)[0]: [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in folder.rglob("samples_*.jsonl")
    }


@installed
@pytest.mark.slow
def test_answers_are_those_of_dense_attention_unless_keys_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(model: str, options: str) -> tuple[list[str], list[float], float]:
        found = answers(monkeypatch, tmp_path / options, model, options)
        generated = found["hipserve_needles"]
        likelihoods = [s["resps"][0][0][0] for s in found["hipserve_needles_likelihood"]]
        return (
            [s["resps"][0][0] for s in generated],
            [float(nats) for nats in likelihoods],
            sum(s["exact_match"] for s in generated) / len(generated),
        )

    dense, dense_nats, score = run("hf", "attn_implementation=sdpa")
    assert score == 1
    whole, nats, score = run("hip", f"{PRUNES},budget=1024")
    assert (whole, score) == (dense, 1)
    assert nats == pytest.approx(dense_nats, abs=1e-3)
    by_name, nats, _ = run("hf", "attn_implementation=hip")  # below `dense_below`
    assert by_name == dense
    assert nats == pytest.approx(dense_nats, abs=1e-3)
    _, nats, score = run("hip", f"{PRUNES},budget=16,rerank=0,bound_reach=0")
    assert score == 0
    assert max(nats) < min(dense_nats) - 1


@installed
def test_options_of_hip_are_checked_before_weights_are_loaded() -> None:
    with pytest.raises(ConfigError, match="budget"):
        bridge.register_model()(pretrained="nowhere", budget=-1)


def test_a_missing_lm_eval_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge.register_model.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        bridge.main()
