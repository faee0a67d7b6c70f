"""Who else is served, how a prompt is cut and what it may answer: the same tokens as alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import scenarios

pytest.importorskip("vllm")

from hipserve.errors import BackendError
from hipserve.integrations.vllm import compat, platform, runners
from hipserve.integrations.vllm.scheduler import QueryBlocks, check_hook

SCRIPT = Path(__file__).with_name("schedules.py")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("schedules")
    return scenarios("company", "constrained", folder=folder, script=SCRIPT)


@pytest.fixture(scope="module")
def company(ran: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return ran["company"]


@pytest.fixture(scope="module")
def constrained(ran: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return ran["constrained"]


def test_the_asynchronous_scheduler_cuts_prompts_at_query_blocks(company: dict[str, Any]) -> None:
    """GPUs use it; `test_engines.py` tests the other one in the same way."""
    assert company["by default"] == "QueryBlockScheduler"
    assert "AsyncScheduler" in company["asynchronous"]
    assert company["together"] == company["alone"]
    assert company["hits"] == company["alone"]


def test_small_steps_and_thresholds_end_and_give_the_same_answers(company: dict[str, Any]) -> None:
    """70 tokens a step for 16 requests, and a threshold below a query block of 64."""
    assert company["small steps"] == company["alone"]


def test_a_seed_gives_the_same_answer_whole_in_chunks_and_after_hits(
    company: dict[str, Any],
) -> None:
    """Every chunk but the last throws its token away: a CPU generator ended the engine there."""
    assert len({tuple(tokens) for tokens in company["alone, seeded"]}) == 6
    assert company["alone, seeded"] != company["alone"]
    assert company["together, seeded"] == company["alone, seeded"]
    assert company["hits, seeded"] == company["alone, seeded"]


def test_structured_outputs_have_their_form(constrained: dict[str, Any]) -> None:
    assert isinstance(json.loads(constrained["json"])["key"], int)
    assert constrained["choice"] in ("north", "south")
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", constrained["regex"])
    assert constrained["grammar"] in ("yes", "no")


def test_ngram_speculation_with_room_for_every_key_changes_nothing(
    constrained: dict[str, Any],
) -> None:
    assert constrained["ngram"] == constrained["expected"]


class Chunks(QueryBlocks):
    """A scheduler without an engine."""

    def __init__(self, mamba: bool) -> None:
        self.need_mamba_block_aligned_split, self.num_prefill_lookahead = mamba, 1
        self.query_block_size, self.hash_block_size = 64, 16

    def count(self, computed: int, new: int, images: bool = False) -> int:
        request: Any = SimpleNamespace(num_tokens=1000, has_encoder_inputs=images)
        return self._reserve_prefill_lookahead(request, computed, new)


def test_chunks_end_at_query_blocks_or_with_the_prompt() -> None:
    chunks = Chunks(mamba=False)
    assert chunks.count(0, 512) == 512
    assert chunks.count(0, 500) == 448
    assert chunks.count(40, 500) == 472
    assert chunks.count(960, 40) == 40
    assert chunks.count(512, 63) == 0


def test_a_chunk_that_waiting_does_not_lengthen_is_read_as_it_is() -> None:
    """In front of an image, and where Mamba layers keep their state: 0 would be 0 for ever."""
    assert Chunks(mamba=False).count(512, 30, images=True) == 30
    assert Chunks(mamba=False).count(512, 70, images=True) == 64
    assert Chunks(mamba=True).count(512, 48) == 48
    assert Chunks(mamba=True).count(512, 47) == 0


def test_a_scheduler_without_the_hook_is_refused() -> None:
    class Renamed:
        def schedule(self) -> None: ...

    with pytest.raises(BackendError, match="does not call _reserve_prefill_lookahead"):
        check_hook(Renamed)


@pytest.mark.parametrize(("asynchronous", "name"), [(True, "Async"), (False, "")])
def test_platforms_set_the_scheduler_of_query_blocks(
    asynchronous: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform.settings, "check", lambda config: None)
    limits = SimpleNamespace(scheduler_cls=None, async_scheduling=asynchronous)
    config: Any = SimpleNamespace(scheduler_config=limits)
    platform.prepare(config)
    wanted = f"hipserve.integrations.vllm.scheduler.{name}QueryBlockScheduler"
    assert limits.scheduler_cls == wanted
    limits.scheduler_cls = "mine"
    platform.prepare(config)
    assert limits.scheduler_cls == "mine"


def test_hip_attention_for_some_layers_counts_as_hip_attention() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def uses(backend: Any, **per_kind: Any) -> bool:
        attention = SimpleNamespace(backend=backend, backend_per_kind=per_kind)
        config: Any = SimpleNamespace(attention_config=attention)
        return compat.uses_hip(config)

    custom, other = AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN
    assert uses(custom)
    assert uses(None, full_attention=custom)
    assert not uses(other, full_attention=other)
    assert not uses(None)


def test_a_vllm_that_was_not_tested_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat.vllm, "__version__", "0.99.1")
    compat.check_version.__wrapped__()
    assert "tested with vllm 0.31, 0.32, 0.33, not with 0.99.1" in caplog.text


def test_a_vllm_without_what_hipserve_uses_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "FIELDS", (*compat.FIELDS, "renamed_field"))
    with pytest.raises(BackendError, match=r"lacks .*\(CommonAttentionMetadata\.renamed_field\)"):
        compat.check_version.__wrapped__()


def test_a_patch_whose_target_is_gone_is_refused_by_name() -> None:
    class Runner:
        pass

    with pytest.raises(BackendError, match=r"has no Runner\._sample, which hipserve repairs"):
        compat.wrap(Runner, "_sample", runners.putting_back)
