"""The translator's parts without an engine: blocks, steps, versions, options, metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from hipserve import BackendError, HiPConfig
from hipserve.config import DEFAULT, NO_INDEX, IndexForm
from hipserve.integrations.vllm import kv_block, layer, metrics, runners
from hipserve.integrations.vllm.runners import StepRequests
from hipserve.integrations.vllm.step import sequences
from hipserve.ops import build_index, write_kv
from hipserve.ops.write_kv.reference import box, moments
from hipserve.plan import pruning_rule
from hipserve.serving import address, environment, log_words
from hipserve.serving.command_line import Server

PRUNES_EARLY = HiPConfig(
    budget=1,
    key_block_size=1,
    bound_block_size=1,
    num_sink_tokens=1,
    sliding_window=1,
    dense_below=0,
)
BOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def kv_blocks(
    blocks: int,
    size: int,
    heads: int,
    dim: int,
    form: IndexForm = DEFAULT.index_form,
    keys: int = 0,
) -> torch.Tensor:
    """`[blocks, heads, size, 2 * dim]` as vLLM hands it out, in pages that are poisoned around."""
    layout = kv_block.BlockLayout(size, heads, dim, torch.float32, form, keys)
    stride = layout.padded_bytes // 4
    raw = torch.full((blocks * stride,), float("nan"))
    return raw.as_strided((blocks, heads, size, 2 * dim), (stride, 2 * dim, heads * 2 * dim, 1))


@pytest.mark.parametrize("size", [16, 64, 128, 256])
@pytest.mark.parametrize("dim", [64, 80])
def test_bounds_lie_in_the_padding_of_their_block(size: int, dim: int) -> None:
    cache = kv_blocks(4, size, 2, dim)
    pages = kv_block.page_views(cache, DEFAULT.index_form)
    k, v = torch.randn(2, size, 2, dim)
    slots = 2 * size + torch.arange(size)  # block 2, whole
    write_kv(k, v, pages.pool, pages.index, slots)
    assert torch.equal(cache[2, 1, :, :dim], k[:, 1])
    assert torch.equal(cache[2, 1, :, dim:], v[:, 1])
    assert pages.index.summaries is not None
    assert torch.equal(
        pages.index.summaries[2], build_index(k[None], backend="reference").summaries[0]
    )
    assert torch.isnan(cache[[0, 1, 3]]).all()
    assert torch.isnan(pages.index.summaries[[0, 1, 3]]).all()


def test_padding_slots_write_nothing() -> None:
    cache = kv_blocks(2, 64, 2, 64)
    pages = kv_block.page_views(cache, DEFAULT.index_form)
    k, v = torch.randn(2, 3, 2, 64)
    write_kv(k, v, pages.pool, pages.index, torch.tensor([-1, 64, -1]))
    assert torch.equal(cache[1, :, 0, :64], k[1])
    assert torch.isnan(cache[0]).all()
    assert torch.isnan(cache[1, :, 1:]).all()


def test_a_block_that_is_used_again_forgets_its_former_keys() -> None:
    cache = kv_blocks(2, 64, 2, 64)
    pages = kv_block.page_views(cache, DEFAULT.index_form)
    k, v = 100 * torch.randn(2, 64, 2, 64)
    write_kv(k, v, pages.pool, pages.index, 64 + torch.arange(64))
    fresh, v = torch.randn(2, 5, 2, 64)
    write_kv(fresh, v, pages.pool, pages.index, 64 + torch.arange(5))
    assert pages.index.summaries is not None
    fine, coarse = (of(fresh, dim=0).to(fresh.dtype) for of in (moments, box))
    assert torch.equal(pages.index.summaries[1, 0], fine)
    assert torch.equal(pages.index.summaries[1, 4], coarse)  # the run of 64 keys above it


def test_a_layer_without_bounds_pads_nothing() -> None:
    layout = kv_block.BlockLayout(128, 2, 64, torch.bfloat16, NO_INDEX)
    assert layout.index_bytes == 0
    assert layout.padded_bytes == 128 * 2 * 128 * 2


def common(lens: list[int], seq_lens: list[int], prefilling: list[bool], **more: Any) -> Any:
    starts = torch.tensor([0, *lens]).cumsum(0).int()
    values = {
        "block_table_tensor": torch.zeros(len(lens), 4, dtype=torch.int32),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "seq_lens_cpu_upper_bound": None,
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "num_reqs": len(lens),
        "max_query_len": max(lens),
        "is_prefilling": torch.tensor(prefilling),
        "req_idx": None,
    }
    return SimpleNamespace(**{**values, **more})


def test_the_end_of_a_prompt_is_no_decode_step() -> None:
    step = common([1, 1, 7, 1], [10, 20, 30, 40], [False, True, True, False])
    rows = sequences(step, StepRequests(("a", "b", "c", "d")), pruning_rule(PRUNES_EARLY, "cpu"))
    assert [row.decoding for row in rows] == [True, False, False, True]
    assert [row.request for row in rows] == ["a", "b", "c", "d"]
    assert [row.seq_len for row in rows] == [10, 20, 30, 40]


def test_a_row_that_reads_everything_keeps_nothing() -> None:
    step = common([1, 1], [3, 4], [False, False])
    rows = sequences(step, StepRequests(("a", "b")), pruning_rule(PRUNES_EARLY, "cpu"))
    assert [row.decoding for row in rows] == [False, True]


def test_rows_that_pad_a_graph_are_left_out() -> None:
    step = common(
        [1, 1, 0, 0], [10, 20, 0, 0], [False, False], req_idx=torch.tensor([7, 3]).numpy()
    )
    rows = sequences(step, runners.step_requests(step), pruning_rule(PRUNES_EARLY, "cpu"))
    assert [(row.request, row.decoding) for row in rows] == [(7, True), (3, True)]


def test_requests_of_the_second_model_runner() -> None:
    step = common([1, 1], [10, 20], [False, False], req_idx=torch.tensor([7, 3]).numpy())
    assert runners.step_requests(step).rows == (7, 3)


def test_steps_without_known_requests_keep_nothing() -> None:
    assert runners.step_requests(common([1], [10], [False])).rows is None


def test_a_runner_tells_rows_and_who_has_ended() -> None:
    seen: list[runners.StepRequests] = []

    def build(runner: Any) -> None:
        seen.append(runners.step_requests(common([1, 1], [5, 6], [False, False])))

    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["x", "y"]))
    update = runners.noting_the_ended(lambda *_: None)
    new = SimpleNamespace(req_id="y")
    cached = SimpleNamespace(resumed_req_ids={"r"})
    update(runner, SimpleNamespace(
        finished_req_ids={"f"}, preempted_req_ids=None, scheduled_new_reqs=[new],
        scheduled_cached_reqs=cached,
    ))  # fmt: skip
    runners.telling_the_rows(build)(runner)
    runners.telling_the_rows(build)(runner)
    started = frozenset({"y", "r"})
    assert seen[0] == StepRequests(("x", "y"), started, started | {"f"})
    assert seen[1] == StepRequests(("x", "y"))


def test_a_stage_makes_room_once_for_what_it_receives() -> None:
    made: list[dict[str, Any]] = []

    def make(**sizes: Any) -> str:
        made.append(sizes)
        return "room"

    runner = SimpleNamespace(
        intermediate_tensors=None, model=SimpleNamespace(make_empty_intermediate_tensors=make),
        model_config=SimpleNamespace(dtype=torch.float32), device="cpu", max_num_tokens=512,
    )  # fmt: skip
    gather = runners.making_room(lambda runner, count: (runner.intermediate_tensors, count))
    assert gather(runner, 3) == gather(runner, 3) == ("room", 3)
    assert made == [{"batch_size": 512, "dtype": torch.float32, "device": "cpu"}]


def test_a_gpu_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "triton_refusal", lambda *_: "Triton is not installed")
    layer.refuse_without_kernels(torch.device("cpu"), torch.bfloat16, 128)
    with pytest.raises(BackendError, match="cannot serve on cuda: Triton is not installed"):
        layer.refuse_without_kernels(torch.device("cuda"), torch.bfloat16, 128)


@pytest.mark.parametrize(("device", "head_dim"), [("cpu", 100), ("cpu", 528), ("cuda", 520)])
def test_a_head_dim_without_kernels_is_refused(device: str, head_dim: int) -> None:
    with pytest.raises(BackendError, match=f"cannot serve on {device}: .*, not {head_dim}; leave"):
        layer.refuse_without_kernels(torch.device(device), torch.bfloat16, head_dim)


def test_workers_are_added_up(tmp_path: Path) -> None:
    first, second = metrics.Tally(tmp_path / "e"), metrics.Tally(tmp_path / "e", worker="other")
    first.add("hipserve_refreshes", 3)
    second.add("hipserve_refreshes", 4)
    second.add("hipserve_dense_query_blocks", 5, "short")
    first.add_unread(3, 0.5, 8)
    second.add_unread(3, 1.5, 8)
    collector = metrics.HiPCollector()
    collector.folders.add(tmp_path / "e")
    samples = {
        (sample.name, sample.labels.get("reason") or sample.labels.get("layer")): sample.value
        for family in collector.collect()
        for sample in family.samples
    }
    assert samples["hipserve_refreshes_total", None] == 7
    assert samples["hipserve_dense_query_blocks_total", "short"] == 5
    assert samples["hipserve_page_bound_bytes", None] == 0
    assert samples["hipserve_unread_attention_total", "3"] == 2
    assert samples["hipserve_metered_total", "3"] == 16
    assert ("hipserve_metered_total", "2") not in samples
    first.remove()
    second.remove()
    assert not (tmp_path / "e").exists()


def test_every_metric_of_the_board_exists() -> None:
    """Ours as the collector names them, vLLM's as its sources do."""
    import vllm.v1.metrics

    text = json.dumps(json.loads(BOARD.read_text()))
    ours = {sample.name for family in metrics.HiPCollector().collect() for sample in family.samples}
    named = set(re.findall(r"hipserve_\w+", text))
    assert named
    assert named <= ours
    sources = "".join(p.read_text() for p in Path(vllm.v1.metrics.__path__[0]).glob("*.py"))
    theirs = set(re.findall(r"vllm:\w+", text))
    assert theirs
    for name in theirs:
        assert re.sub("_(total|bucket|sum|count)$", "", name) in sources, name


def serve(*flags: str, **options: Any) -> Server:
    return Server("m", "name", HiPConfig(), flags=flags, **options)


def test_command_line() -> None:
    words = serve("--max-model-len", "4096").command()
    assert words[words.index("--served-model-name") + 1] == "name"
    assert words[words.index("--attention-backend") + 1] == "CUSTOM"
    options = json.loads(words[words.index("--additional-config") + 1])
    assert HiPConfig.from_dict(options["hip"]) == HiPConfig()
    assert words[-2:] == ["--max-model-len", "4096"]
    assert "--trust-remote-code" not in words
    own = serve("--served_model_name=x", "--gpu-memory-utilization", "0.3").command()
    assert own.count("--served-model-name") == 0
    assert "--kv-cache-memory-bytes" not in own
    dense = Server("m", "name", None).command()
    assert "--attention-backend" not in dense


def test_the_key_is_not_on_the_command_line() -> None:
    one = serve(api_key="secret")
    assert "secret" not in " ".join(one.command())
    assert one.environment()["VLLM_API_KEY"] == "secret"


def test_idle_threads_give_their_cores_away_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "on_cpu", lambda: True)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert serve().environment()["GOMP_SPINCOUNT"] == str(environment.SPIN_COUNT)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert serve().environment()["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "GOMP_SPINCOUNT" not in serve().environment()


@pytest.mark.parametrize(
    ("workers", "shared"), [(1, "0,1,2,3"), (2, "0,1|2,3"), (3, "0|1|2"), (8, "0|1|2|3|" * 2)]
)
def test_workers_share_the_cores(workers: int, shared: str) -> None:
    text = environment.share_cores([0, 1, 2, 3], workers)
    assert len(text.split("|")) == workers
    if workers <= 4:
        assert text == shared


@pytest.mark.parametrize(
    ("flags", "workers"),
    [
        ("", 1),
        ("-tp 2", 2),
        ("--tensor-parallel-size=2 --pipeline-parallel-size 3", 6),
        ("--data-parallel-size 2", 2),
        ("-dp 4 -tp 2 --data-parallel-size-local 1", 2),
        ("--tensor_parallel_size 2 --nnodes 2 --node-rank 1", 1),
    ],
)
def test_every_worker_of_this_host_gets_cores(flags: str, workers: int) -> None:
    assert serve(*flags.split()).num_workers == workers


def test_loopback() -> None:
    assert all(map(address.is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "localhost")))
    assert not any(map(address.is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


def test_why_a_server_did_not_start() -> None:
    lines = [
        "(APIServer pid=1) INFO something",
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig",
        "  Value error, block_size: expected 256, got 320; use 256 [type=value_error]",
    ]
    assert log_words.complaint(lines) == "block_size: expected 256, got 320; use 256"
    assert log_words.complaint(["OSError: no such file"]) == "no such file"
    assert "--verbose" in log_words.complaint(["INFO fine"])
