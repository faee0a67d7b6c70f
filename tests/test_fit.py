"""`hipserve serve`: what does not fit is refused before anything is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hipserve import ArgumentError, FitError, HiPConfig, Offload
from hipserve.capacity.memory import BLOCK, Service
from hipserve.capacity.shape import ModelShape
from hipserve.cli import serve
from hipserve.cli.ready import describe_index, describe_pool
from hipserve.cli.serve import make_offload, shape_of, with_offload, with_pool_for
from hipserve.host import HostMemory, InstalledGpu
from hipserve.models import bundled_path
from hipserve.models.config_file import read_config
from hipserve.serving import command_line, environment
from hipserve.serving.client import Facts
from hipserve.serving.command_line import Server
from hipserve.serving.fit import check_fit, host_blocks, largest_pool, number

GIB = 2**30
SHAPE = ModelShape.of(read_config("acorn"))
"""12 layers, 2 KV heads of 64: 6,144 bytes of keys and values a token, and 432 of index."""


def server(*flags: str, config: HiPConfig | None = HiPConfig()) -> Server:  # noqa: B008
    return Server(str(bundled_path()), "acorn", config, flags=flags)


def refusal(*flags: str, available: int, config: HiPConfig | None = HiPConfig()) -> FitError:  # noqa: B008
    with pytest.raises(FitError) as caught:
        check_fit(server(*flags, config=config), SHAPE, HostMemory(64 * GIB, available))
    return caught.value


def test_what_fits_starts() -> None:
    check_fit(server(), SHAPE, HostMemory(64 * GIB, 8 * GIB))
    check_fit(server("--max-model-len", "8k"), SHAPE, HostMemory(64 * GIB, 2 * GIB))
    check_fit(server("--num-gpu-blocks-override", "4"), SHAPE, HostMemory(64 * GIB, 2 * GIB))


def test_weights_that_exceed_the_memory_are_refused() -> None:
    error = refusal(available=GIB)
    assert re.search(r"acorn does not fit this machine: weights 44.3 MiB \+ processes", str(error))
    assert "and 1.00 GiB are available" in str(error)
    assert error.hint == ""
    limited = HostMemory(64 * GIB, GIB, container=GIB)
    with pytest.raises(FitError, match=r"are available in a container of 1\.00 GiB"):
        check_fit(server("--num-gpu-blocks-override", "9"), SHAPE, limited)


def test_a_cache_that_exceeds_the_memory_names_one_that_fits() -> None:
    flags = ("--max-model-len", "8K", "--kv-cache-memory-bytes")
    error = refusal(*flags, str(9 * GIB), available=8 * GIB)
    assert "+ KV cache 9.00 GiB = 10." in str(error)
    name, value = error.hint.split()
    assert name == "--kv-cache-memory-bytes"
    check_fit(server(*flags, value), SHAPE, HostMemory(64 * GIB, 8 * GIB))
    refusal(*flags, str(int(value) + 1), available=8 * GIB)


def test_a_context_that_exceeds_the_cache_names_both_ways_out() -> None:
    """131,072 tokens of 6,552 bytes, and the block that vLLM keeps empty, in a quarter of 2 GiB."""
    error = refusal(available=2 * GIB)
    assert "a sequence of 131,072 tokens needs 0.80 GiB of KV cache, and it has 0.50" in str(error)
    (context, memory) = re.findall(r"\d+", error.hint)
    machine = HostMemory(64 * GIB, 2 * GIB)
    check_fit(server("--max-model-len", context), SHAPE, machine)
    refusal("--max-model-len", str(int(context) + 1), available=2 * GIB)
    check_fit(server("--kv-cache-memory-bytes", memory), SHAPE, machine)
    assert int(memory) == (131072 + BLOCK) * (6144 + 432)
    refusal("--kv-cache-memory-bytes", str(int(memory) - 1), available=2 * GIB)
    dense = refusal(available=2 * GIB, config=None)
    assert int(dense.hint.split()[-1]) == (131072 + BLOCK) * 6144


@pytest.mark.parametrize(
    "flags",
    [
        ("-tp", "2"),
        ("--quantization=fp8",),
        ("--hf-overrides", "{}"),
        ("--speculative-config", "{}"),
    ],
)
def test_servers_that_keep_something_else_are_left_to_vllm(flags: tuple[str, ...]) -> None:
    check_fit(server(*flags), SHAPE, HostMemory(64 * GIB, 1))


@pytest.mark.parametrize(
    ("text", "value"),
    [("8192", 8192), ("8k", 8000), ("8K", 8192), ("1.5M", 1572864), ("auto", None), (None, None)],
)
def test_numbers_as_vllm_takes_them(text: str | None, value: int | None) -> None:
    assert number(text) == value


def test_the_default_cache_heeds_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = classmethod(lambda cls: HostMemory(64 * GIB, 4 * GIB, container=5 * GIB))
    monkeypatch.setattr(HostMemory, "read", limited)
    monkeypatch.setattr(command_line, "on_cpu", lambda: True)
    words = server().command()
    assert words[words.index("--kv-cache-memory-bytes") + 1] == str(GIB)
    for flags in (("--gpu-memory-utilization", "0.5"), ("--kv-cache-memory-bytes=7",)):
        assert "--kv-cache-memory-bytes" not in server(*flags).command()
    assert environment.kv_memory(server().option, None) == environment.UNSAID // 4


def test_the_shape_is_what_vllm_loads() -> None:
    assert shape_of(server()) == SHAPE
    wide = shape_of(server("--dtype", "float32"))
    assert wide is not None
    assert wide.weights.nbytes == 2 * SHAPE.weights.nbytes
    half = shape_of(server("--dtype=half"))
    assert half is not None
    assert half.dtype == "float16"
    assert shape_of(replace(server(), model="nobody/has-this-model")) is None


def hosted(memory: int | str, *flags: str) -> Server:
    offload = Offload(host_memory=memory, file="/nvme/kv")
    return with_offload(server(*flags, config=HiPConfig(code_bits=4)), offload, SHAPE)


def test_blocks_in_a_file_are_counted_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 256 tokens of the bundled model is 1,572,864 bytes."""
    monkeypatch.setattr(command_line, "on_cpu", lambda: True)
    found = hosted(100 * 1_572_864 + 5)
    assert found.hosted is not None
    words = found.command()
    assert words[words.index("--num-gpu-blocks-override") + 1] == "100"
    assert words[words.index("--kv-cache-memory-bytes") + 1] == str(found.hosted.index_bytes)
    table = json.loads(words[words.index("--additional-config") + 1])["hip"]
    assert table["offload"] == {"host_memory": 100 * 1_572_864 + 5, "file": "/nvme/kv"}
    other = hosted("1 GiB", "--block-size", "128").hosted
    assert other is not None
    assert other.number == 2**30 // 786_432
    assert "offload" not in json.loads(server().command()[-1])["hip"]


def test_a_file_has_to_hold_one_sequence_and_memory_its_index() -> None:
    machine = HostMemory(64 * GIB, 2 * GIB)
    found = hosted("1GiB", "--max-model-len", "32K")
    check_fit(found, SHAPE, machine)
    with pytest.raises(FitError, match=r"a sequence of 131,072 tokens needs 0\.75 GiB") as caught:
        check_fit(hosted("512MiB"), SHAPE, machine)
    context, memory = re.findall(r"\d+", caught.value.hint)
    check_fit(hosted("512MiB", "--max-model-len", context), SHAPE, machine)
    check_fit(hosted(int(memory)), SHAPE, machine)
    with pytest.raises(FitError, match="131,072"):
        check_fit(hosted(int(memory) - 1), SHAPE, machine)
    with pytest.raises(FitError, match=r"\+ index 1\.36 GiB = "):
        check_fit(hosted("8GiB"), SHAPE, machine)


def test_options_of_offloading_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "on_cpu", lambda: True)
    assert make_offload(None, None) is None
    found = make_offload(Path("kv"), GIB)
    assert found == Offload(GIB, file=Path.cwd() / "kv")
    with pytest.raises(ArgumentError, match="host_kv_memory: expected the size of the file"):
        make_offload(Path("kv"), None)
    with pytest.raises(ArgumentError, match="host_kv_memory: expected --kv-offload or --kv-file"):
        make_offload(None, GIB)
    with pytest.raises(ArgumentError, match="dense"):
        make_offload(Path("kv"), GIB, dense=True)
    with pytest.raises(ArgumentError, match="kv_offload: expected a model on a GPU"):
        make_offload(None, GIB, on_host=True)
    with pytest.raises(ArgumentError, match="is on this machine"):
        with_offload(server(), found, None)
    monkeypatch.setattr(serve, "on_cpu", lambda: False)
    with pytest.raises(ArgumentError, match="kv_file: expected a model on a CPU"):
        make_offload(Path("kv"), GIB)
    monkeypatch.setattr(HostMemory, "read", classmethod(lambda cls: HostMemory(64 * GIB, 48 * GIB)))
    assert make_offload(None, None, on_host=True) == Offload(24 * GIB)
    assert make_offload(None, GIB, GIB // 4, on_host=True) == Offload(GIB, GIB // 4)


def test_a_card_has_to_hold_index_tiles_and_staging() -> None:
    """The bundled model's pool of 1 GiB, whose tiles take an eighth."""
    machine, card = HostMemory(64 * GIB, 8 * GIB), InstalledGpu("a card", 4 * GIB)

    def served(offload: Offload) -> Server:
        return with_offload(server(config=HiPConfig(code_bits=4)), offload, SHAPE)

    check_fit(served(Offload(GIB)), SHAPE, machine, card)
    with pytest.raises(FitError, match=r"tiles 3\.50 GiB \+ staging and steps"):
        check_fit(served(Offload(GIB, 7 * GIB // 2)), SHAPE, machine, card)
    with pytest.raises(FitError, match="tiles that one step reads take") as caught:
        check_fit(served(Offload(GIB, 2**20)), SHAPE, machine, card)
    least = int(caught.value.hint.split()[-1])
    check_fit(served(Offload(GIB, least)), SHAPE, machine, card)
    with pytest.raises(FitError, match=r"--host-kv-memory is 9\.00 GiB"):
        check_fit(served(Offload(9 * GIB, GIB)), SHAPE, machine, InstalledGpu("a card", 80 * GIB))
    with pytest.raises(FitError, match="a sequence of 131,072 tokens needs"):
        check_fit(served(Offload(GIB // 2)), SHAPE, machine, card)
    host = HostMemory(640 * GIB, 600 * GIB)
    for tiles in (None, GIB):
        with pytest.raises(FitError, match="does not fit a card: weights") as caught:
            check_fit(served(Offload(300 * GIB, tiles)), SHAPE, host, card)
        most = int(caught.value.hint.removeprefix("--host-kv-memory "))
        check_fit(served(Offload(most, tiles)), SHAPE, host, card)
        with pytest.raises(FitError, match="does not fit a card"):
            check_fit(served(Offload(most + 32 * 2**20, tiles)), SHAPE, host, card)


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--pipeline-parallel-size"])
def test_workers_divide_pool_and_index_and_each_has_tiles(flag: str) -> None:
    config, card = HiPConfig(code_bits=4), InstalledGpu("a card", 4 * GIB)
    alone, shared = (
        with_offload(server(*flags, config=config), Offload(4 * GIB, GIB), SHAPE)
        for flags in ((), (flag, "2"))
    )
    assert alone.hosted
    assert shared.hosted
    assert shared.hosted.number == alone.hosted.number
    assert shared.hosted.index_bytes == pytest.approx(alone.hosted.index_bytes / 2, rel=0.01)
    pool = (largest_pool(x, SHAPE, card) for x in (alone, shared))
    assert next(pool) < next(pool) / 1.9
    assert "1.00 GiB of tiles on each of 2" in describe_pool(shared)
    unsaid = replace(shared, offload=Offload(4 * GIB))
    assert "256 MiB of tiles on each of 2" in describe_pool(unsaid)
    with pytest.raises(FitError, match=r"--host-kv-memory is 4\.00 GiB"):
        check_fit(shared, SHAPE, HostMemory(64 * GIB, 3 * GIB), card)


@pytest.mark.parametrize(("bits", "codes"), [(16, ""), (4, " with codes of 4 bits")])
def test_the_ready_card_counts_the_index_as_the_plan_does(bits: int, codes: str) -> None:
    config, facts = HiPConfig(code_bits=bits), Facts("acorn", 8192, 10_000, 4_080_000)
    service = Service(SHAPE, config, BLOCK)
    token, share = service.index_token_bytes, service.index_token_bytes / 6144
    assert describe_index(config, facts, SHAPE) == (
        f"4 MiB, inside the KV cache: {token:,.0f} bytes a token, {share:.1%} of keys and values"
        + codes
    )
    assert describe_index(config, facts, None) == "4 MiB, inside the KV cache"
    assert describe_index(None, facts, SHAPE) == "none"


def test_a_pool_of_no_given_size_is_no_larger_than_the_card_has_room_for() -> None:
    host, card = HostMemory(640 * GIB, 600 * GIB), InstalledGpu("a card", 8 * GIB)
    for tiles in (None, GIB):
        asked = with_offload(
            server(config=HiPConfig(code_bits=4)), Offload(300 * GIB, tiles), SHAPE
        )
        fitting = with_pool_for(card, asked, SHAPE)
        assert fitting.offload is not None
        assert fitting.hosted == host_blocks(fitting, SHAPE)
        assert GIB < fitting.offload.host_bytes < 300 * GIB
        check_fit(fitting, SHAPE, host, card)
        assert with_pool_for(InstalledGpu("a large one", 800 * GIB), asked, SHAPE) is asked
