"""`hipserve plan`: from config.json alone, with exit codes, and the example in docs/plan.md."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hipserve.capacity import cards
from hipserve.cli import main as command
from hipserve.cli import plan
from hipserve.cli.numbers import parse_size
from hipserve.host import HostMemory, InstalledGpu

ROOT = Path(__file__).parent.parent
SHAPE = str(ROOT / "docs/data/shape-8b.json")
GIB = 2**30


def invoke(*words: str) -> Result:
    return CliRunner().invoke(command.app, ["plan", *words])


def planned(*words: str) -> dict[str, Any]:
    return json.loads(invoke(*words, "--json").stdout)


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> str:
    monkeypatch.setattr(sys, "argv", ["hipserve", "plan", *words])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    streams = capsys.readouterr()
    assert (exit_.value.code, streams.out) == (2, "")
    return streams.err


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB, of which 48 are free, and no GPU."""
    read = classmethod(lambda cls: HostMemory(64 * GIB, 48 * GIB))
    monkeypatch.setattr(HostMemory, "read", read)
    monkeypatch.setattr(plan, "installed_gpu", lambda: None)


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from hipserve.cli.main import app\n"
        "try: app(['plan', 'acorn', '--gpu', 'h100', '--kv-offload'])\n"
        "except SystemExit as error: assert not error.code\n"
        "sys.exit(', '.join({'torch', 'transformers', 'vllm'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"pool on the host" in done.stdout


def test_the_page_shows_what_its_commands_print() -> None:
    page = (ROOT / "docs/plan.md").read_text("utf-8")
    examples = re.findall(r"```\n\$ hipserve plan ([^\n]+)\n(.*?)```", page, re.S)
    assert len(examples) >= 2
    for words, shown in examples:
        arguments = [str(ROOT / w) if w.startswith("docs/") else w for w in shlex.split(words)]
        printed = invoke(*arguments).stdout.replace(f"{ROOT}/", "")
        assert without_host(printed) == without_host(shown)


def without_host(text: str) -> list[str]:
    """The lines that do not depend on the machine."""
    return [line for line in text.splitlines() if not line.startswith("host ")]


def test_a_model_that_fits_gets_its_command() -> None:
    done = invoke(SHAPE, "--gpu", "h100-80g", "--code-bits", "8", "--max-num-batched-tokens", "4k")
    assert done.exit_code == 0
    flags = "--max-model-len 131072 --max-num-seqs 1 --max-num-batched-tokens 4096 --code-bits 8"
    assert f"command   hipserve serve MODEL {flags}\n" in done.stdout
    assert "fits      yes\n" in done.stdout
    assert "(an estimate: bytes over bandwidth; kernels take longer)" in done.stdout


def test_what_does_not_fit_ends_with_1_and_the_nearest_that_does() -> None:
    words = (SHAPE, "--gpu", "h100-80g", "--max-num-seqs", "4")
    done = invoke(*words)
    assert (done.exit_code, "command" in done.stdout) == (1, False)
    (context,) = re.findall(r"--max-model-len (\d+)\n", done.stdout)
    (sequences,) = re.findall(r"--max-num-seqs (\d+)\n", done.stdout)
    assert invoke(*words, "--max-model-len", context).exit_code == 0
    assert invoke(*words, "--max-model-len", str(int(context) + 1)).exit_code == 1
    assert invoke(*words[:3], "--max-num-seqs", sequences).exit_code == 0
    assert invoke(*words[:3], "--max-num-seqs", str(int(sequences) + 1)).exit_code == 1


def test_where_nothing_fits_the_memory_is_named() -> None:
    done = invoke(SHAPE, "--gpu", "l4", "--max-model-len", "256", "--dtype", "float32")
    assert done.exit_code == 1
    (needed,) = re.findall(r"one such sequence needs a device of ([0-9.]+) GiB", done.stdout)
    fitting = ("--max-model-len", "256", "--dtype", "float32", "--device-memory")
    assert invoke(SHAPE, *fitting, f"{float(needed) + 0.01}GiB").exit_code == 0
    assert invoke(SHAPE, *fitting, f"{float(needed) - 0.01}GiB").exit_code == 1


def test_offload_is_proposed_where_it_helps_and_refused_where_it_does_not() -> None:
    words = (SHAPE, "--gpu", "rtx4090-24g", "--max-model-len", "64k")
    assert re.search(r"with --kv-offload it fits: 8.03 GiB on the host\n", invoke(*words).stdout)
    there = planned(*words, "--kv-offload")
    assert (there["fits"], there["config"]["code_bits"]) == (True, 4)
    assert there["parts"]["arena"] >= there["parts"]["arena_floor"] > 0
    parts = there["parts"]
    sizes = ["--host-kv-memory", str(parts["pool"]), "--kv-device-memory", str(parts["arena"])]
    # without --code-bits: the server chooses 4, and as many candidates as the plan has
    assert there["command"][-5:] == ["--kv-offload", *sizes]
    eight = planned(*words, "--kv-offload", "--code-bits", "8")
    assert eight["command"][-2:] == ["--code-bits", "8"]
    taken = sum(x for name, x in there["parts"].items() if name not in ("pool", "arena_floor"))
    assert taken == there["room"]["device"]
    assert there["room"]["host"] == 24 * GIB
    easy = invoke(SHAPE, "--gpu", "h200-141g", "--kv-offload")
    assert "everything fits on the card: leave out --kv-offload" in easy.stdout
    little = ("--gpu", "h100-80g", "--kv-offload", "--max-model-len", "448k")
    done = invoke(SHAPE, *little, "--host-kv-memory", "64GiB")
    assert re.search(r"offload buys little here: contexts of 524,032 tokens instead", done.stdout)
    assert "chunks of 46,080 (a tenth of the context), hide it" in done.stdout
    assert 'with model.config.hip = {"code_bits": 4, "rerank": 8}\n' in done.stdout
    much = invoke(SHAPE, *little, "--host-kv-memory", "256GiB")
    assert "buys little" not in much.stdout
    short = invoke(SHAPE, *little, "--host-kv-memory", "8GiB")
    assert short.exit_code == 1
    assert "the pool needs 56.03 GiB and may take 8.00 GiB" in short.stdout


def test_no_command_is_proposed_that_serve_refuses(tmp_path: Path) -> None:
    table = json.loads(Path(SHAPE).read_text("utf-8"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**table, "model_type": "gemma3", "sliding_window": 1024}), "utf-8")
    there = planned(str(path), "--gpu", "h100-80g", "--kv-offload")
    assert any(there["model"]["windows"])
    assert (there["fits"], there["command"]) == (True, None)
    shown = invoke(str(path), "--gpu", "h100-80g", "--kv-offload").stdout
    assert "in Python HiPCache(" in shown
    assert "hipserve serve" not in shown


def test_a_pool_is_held_against_the_limit_of_the_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited = classmethod(lambda cls: HostMemory(64 * GIB, 6 * GIB, container=8 * GIB))
    monkeypatch.setattr(HostMemory, "read", limited)
    done = invoke(SHAPE, "--gpu", "h100-80g", "--kv-offload")
    assert done.exit_code == 1
    assert "6.00 GiB available of 64.00 GiB, limit of the container 8.00 GiB" in done.stdout
    assert "the pool needs 16.03 GiB and may take 3.00 GiB" in done.stdout


def test_a_cpu_machine_shares_its_memory() -> None:
    done = planned()
    parts = done["parts"]
    assert done["machine"] == {"title": "this CPU machine", "memory": 48 * GIB, "share": 1}
    memory = str(parts["keys_values"] + parts["index"] + parts["windows"])
    assert done["command"][-2:] == ["--kv-cache-memory-bytes", memory]
    assert done["tokens_per_second_at_most"] == {}
    assert "this CPU machine: 48.00 GiB available" in invoke().stdout


def test_a_cpu_machine_keeps_them_in_a_file() -> None:
    resident, there = planned(SHAPE), planned(SHAPE, "--kv-offload")
    assert there["parts"]["pool"] == resident["parts"]["keys_values"]
    assert there["command"][-4:] == [
        "--kv-file",
        "kv",
        "--host-kv-memory",
        str(there["parts"]["pool"]),
    ]
    assert there["longest_context"] > 3 * resident["longest_context"]
    long = (SHAPE, "--max-model-len", "512k")
    assert "with --kv-offload it fits: 64.03 GiB in a file\n" in invoke(*long).stdout
    shown = invoke(*long, "--kv-offload").stdout
    assert "  file                     64.03 GiB\n" in shown
    assert invoke(*long, "--kv-offload", "--host-kv-memory", "64GiB").exit_code == 1


def test_the_installed_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "installed_gpu", lambda: InstalledGpu("NVIDIA H200", 143771 << 20))
    done = planned(SHAPE)
    assert done["machine"]["memory"] == 143771 << 20
    assert done["chunk"] == cards.LARGE_CHUNK
    assert done["tokens_per_second_at_most"]["resident"] > 200
    monkeypatch.setattr(plan, "installed_gpu", lambda: InstalledGpu("NVIDIA X1", 8 << 30))
    done = planned(SHAPE)
    assert (done["fits"], done["tokens_per_second_at_most"]) == (False, {})
    assert done["chunk"] == plan.CHUNK


def test_names_resolve_on_this_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory, the file itself, or the hub's cache; nothing is downloaded."""
    config = json.loads(Path(SHAPE).read_text("utf-8"))
    snapshot = tmp_path / "hub/models--a--b/snapshots/1234"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    refs = tmp_path / "hub/models--a--b/refs"
    refs.mkdir()
    (refs / "main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = planned(SHAPE, "--gpu", "h100")["parts"]
    assert planned("a/b", "--gpu", "h100")["parts"] == expected
    assert planned(str(snapshot), "--gpu", "h100")["parts"] == expected
    message = refused(monkeypatch, capsys, "a/c", "--gpu", "h100")
    assert "a/c, which is not on this machine\nhint: hf download a/c config.json" in message
    assert "without a config.json" in refused(monkeypatch, capsys, str(refs))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "a GGUF file" in refused(monkeypatch, capsys, str(tmp_path / "m.gguf"))
    for text in ("{", "[]"):
        (snapshot / "config.json").write_text(text)
        assert "config.json" in refused(monkeypatch, capsys, str(snapshot))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpu", "h101"], "hint: did you mean"),
        (["--gpu", "h100", "--kv-offload", "--code-bits", "16"], "--code-bits: expected 4 or 8"),
        (["--gpu", "h100", "--code-bits", "5"], "--code-bits: expected 4, 8 or 16, got 5"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype: expected auto on a CPU machine, got fp8"),
        (["--gpu", "h100", "--kv-cache-dtype", "fp9"], "hint: did you mean fp8?"),
        (
            ["--gpu", "h100", "--kv-cache-dtype", "fp8", "--kv-offload"],
            "--kv-offload: expected keys and values as the model computes them, got fp8",
        ),
        (["--dtype", "int8"], "--dtype: expected one of auto, bfloat16"),
        (["../nowhere/at/all"], "../nowhere/at/all, which does not exist"),
        (["no|name"], "which is neither"),
        (["nofile.json"], "got nofile.json, which does not exist"),
        (["nofile.gguf"], "got nofile.gguf, which does not exist"),
        ([__file__], "a file of another kind"),
        (["--host-kv-memory", "32GiB"], "--host-kv-memory: expected --kv-offload with it"),
    ],
)
def test_wrong_words_are_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    assert sentence in refused(monkeypatch, capsys, *words)


def test_keys_in_fp8_take_half_the_bytes() -> None:
    card = ("--gpu", "h100-80g")
    plain, fp8 = planned(*card), planned(*card, "--kv-cache-dtype", "fp8")
    assert fp8["kv_token_bytes"] == plain["kv_token_bytes"] / 2
    assert fp8["index_token_bytes"] == plain["index_token_bytes"]
    assert fp8["longest_context"] > 1.5 * plain["longest_context"]
    assert fp8["command"][-2:] == ["--kv-cache-dtype", "fp8"]


def test_the_command_keeps_the_type_of_weights() -> None:
    command = planned(SHAPE, "--gpu", "h100", "--dtype", "float32")["command"]
    assert command[-2:] == ["--dtype", "float32"]
    assert "--dtype" not in planned(SHAPE, "--gpu", "h100")["command"]


def test_the_command_names_what_can_be_served(tmp_path: Path) -> None:
    """The directory of a config.json that has weights beside it; a config.json alone is none."""
    path = tmp_path / "config.json"
    path.write_text(Path(SHAPE).read_text("utf-8"), "utf-8")
    for name in (str(path), str(tmp_path)):
        there = planned(name, "--gpu", "h100")
        assert there["command"][2] == "MODEL"
        assert "a config.json alone cannot be served" in there["notes"][-1]
    (tmp_path / "model.safetensors").touch()
    for name in (str(path), str(tmp_path)):
        there = planned(name, "--gpu", "h100")
        assert (there["command"][2], there["notes"]) == (str(tmp_path), [])


def test_contexts_beyond_the_positions_of_a_model_say_so() -> None:
    assert "longest   389,888 tokens of context by memory, beyond 131,072 with --extend\n" in (
        invoke(SHAPE, "--gpu", "h100").stdout
    )
    assert "beyond" not in invoke(SHAPE, "--gpu", "l4").stdout
    beyond = planned(SHAPE, "--gpu", "h200", "--max-model-len", "256k")["command"]
    assert beyond[beyond.index("--extend") + 1] == "stream"
    words = ("--kv-offload", "--max-model-len", "448k", "--host-kv-memory", "64GiB")
    moved = planned(SHAPE, "--gpu", "h100-80g", *words)["command"]
    assert moved[moved.index("--extend") + 1] == "yarn"
    assert "--extend" not in planned(SHAPE, "--gpu", "h200")["command"]


def test_numbers_are_written_as_people_read_them() -> None:
    assert "23.2 M parameters" in invoke("--gpu", "h100").stdout
    one = invoke(SHAPE, "--gpu", "h100", "--max-model-len", "256k").stdout
    assert "most      1 sequence of this context at once\n" in one


@pytest.mark.parametrize(
    ("text", "value"),
    [("24G", 24e9), ("24 GB", 24e9), ("22.5GiB", 22.5 * GIB), ("512m", 512e6), ("1048576", 2**20)],
)
def test_sizes(text: str, value: float) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "0", "0G", "-1G", "24", "9K", "24X", "G", "1e9", "24GGB"])
def test_wrong_sizes(text: str) -> None:
    assert invoke("--gpu", "h100", "--device-memory", text).exit_code == 2


def large_model(tmp_path: Path) -> str:
    """The 8B shape with eight times the layers, which no single card holds."""
    table = json.loads(Path(SHAPE).read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**table, "num_hidden_layers": 256}))
    return str(tmp_path / "config.json")


def test_what_one_card_does_not_hold_several_do(tmp_path: Path) -> None:
    words = (large_model(tmp_path), "--gpu", "h100-80g", "--max-model-len", "64k")
    alone = invoke(*words)
    assert alone.exit_code == 1
    (cards,) = re.findall(r"on (\d+) such cards it fits: --tensor-parallel-size \1\n", alone.stdout)
    together = invoke(*words, "--tensor-parallel-size", cards)
    assert together.exit_code == 0
    assert f"cards     {cards}, each with its share" in together.stdout
    assert f" --tensor-parallel-size {cards}\n" in together.stdout
    assert "8 KV heads of 128" in together.stdout
    assert invoke(*words, "--tensor-parallel-size", str(int(cards) // 2)).exit_code == 1


def test_cards_that_share_a_model_have_its_parts() -> None:
    whole, half = (
        planned(SHAPE, "--gpu", "h100-80g", "--tensor-parallel-size", cards) for cards in "12"
    )
    for part in ("weights", "keys_values", "index"):
        assert 2 * half["parts"][part] == pytest.approx(whole["parts"][part], abs=4)
    speeds = (x["tokens_per_second_at_most"]["resident"] for x in (whole, half))
    assert next(speeds) < next(speeds) / 1.9
    many = planned(SHAPE, "--gpu", "h100-80g", "--tensor-parallel-size", "16")
    assert many["model"]["num_kv_heads"] == 1  # eight heads, two cards each


def test_cards_divide_the_pool_and_have_their_own_tiles() -> None:
    words = (SHAPE, "--gpu", "h100-80g", "--kv-offload", "--host-kv-memory", "64GiB")
    whole, half = (planned(*words, "--tensor-parallel-size", cards) for cards in "12")
    assert half["parts"]["pool"] == whole["parts"]["pool"]
    assert 2 * half["parts"]["arena_floor"] == whole["parts"]["arena_floor"]
    assert half["parts"]["arena"] <= half["parts"]["pool"] // 2
    flags = half["command"]
    assert flags[flags.index("--host-kv-memory") + 1] == str(half["parts"]["pool"])
    assert flags[flags.index("--kv-device-memory") + 1] == str(half["parts"]["arena"])
    shown = invoke(*words, "--tensor-parallel-size", "2").stdout
    assert "of 64.00 GiB, of all cards together" in shown
    assert "HiPCache" not in shown
    shared = planned(*words, "--tensor-parallel-size", "16")  # two cards have the same head
    assert shared["parts"]["pool"] == 2 * whole["parts"]["pool"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "h100", "--tensor-parallel-size", "3"), "a number that divides 32 query and 8"),
        (("--tensor-parallel-size", "2"), "expected a GPU"),
    ],
)
def test_cards_that_cannot_share_are_refused(
    words: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan, "installed_gpu", lambda: None)
    assert said in refused(monkeypatch, capsys, SHAPE, *words)
