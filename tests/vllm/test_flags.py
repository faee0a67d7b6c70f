"""vLLM's own flags behind `hipserve serve`, before and after vLLM reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer

pytest.importorskip("vllm")

from hipserve.cli import serve
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, BackendError, FitError, HipserveError
from hipserve.integrations.vllm import compat
from hipserve.models.config_file import read_config
from hipserve.serving import log_words, refusals
from hipserve.serving.address import free_port
from hipserve.serving.command_line import Server

EXTENDED = {
    ("stream", ""): ({"max_position_embeddings": 524288}, "524288"),
    ("stream", "--max-model-len 256K"): ({"max_position_embeddings": 262144}, None),
    ("yarn", "--max-model-len 262144"): (
        {
            "rope_parameters": {
                "rope_theta": 2000000.0,
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 131072,
            }
        },
        None,
    ),
}


@pytest.mark.parametrize("given", EXTENDED)
def test_a_longer_context_is_set_up_for_vllm(given: tuple[str, str]) -> None:
    extend, flags = given
    config = HiPConfig.from_dict({"extend": extend})
    server = Server("acorn", "acorn", config, flags=tuple(flags.split()))
    made = serve.extended(server, read_config("acorn"))
    overrides, length = EXTENDED[given]
    assert json.loads(made.option("--hf-overrides") or "") == overrides
    assert length is None or made.option("--max-model-len") == length
    assert made.config is not None
    assert made.config.trained_length == 131072
    with pytest.raises(ArgumentError, match="extend: expected"):
        serve.extended(made, read_config("acorn"))


REFUSED = {
    "--additional-config.hip.budget 64": "--additional-config: expected HiP attention",
    "--additional-conf={}": "--additional-conf: expected HiP attention",
    "-ac.backend=CUSTOM": "-ac: expected HiP attention",
    "--attention-config.backend X": "--attention-config: expected HiP attention",
    "--hos 0.0.0.0": "--hos: expected --host as this command reads it",
    "--max-modl-len 9": "did you mean --max-model-len",
    "/no/such/directory": 'got "/no/such/directory" (no such directory)',
    "a/b/c": 'got "a/b/c" (no such directory)',
    "pyproject.toml": 'got "pyproject.toml" (a file of another kind)',
    "docs/data": 'got "docs/data" (a directory without a config.json)',
    "--max-model-len 200k": "at most 131,072 tokens, which the model was trained for, got 200,000",
}
REFUSED_IN_A_FILE = {
    "attention-backend: TRITON_ATTN": "--attention-backend: expected HiP attention",
    "additional_config: {hip: {budget: 64}}": "--additional-config: expected HiP attention",
    "trust-remote-code: true": "--trust-remote-code: expected no code",
    "host: 0.0.0.0": "--host: expected --host as this command reads it",
    "model: acorn": "no model in vLLM's file",
    "max-modl-len: 8192": "did you mean --max-model-len",
    "- 3": "no table",
    "a: [": "expected vLLM's flags as YAML",
}
HALF_A_MINUTE_EARLY = {
    "--kv-file kv --host-kv-memory 1G --meter": 'meter: expected "off" with offload',
    "--kv-file kv --host-kv-memory 1G --code-bits 16": "code_bits: expected 4 or 8 where keys are",
    "--kv-file kv --host-kv-memory 1G -tp 2": "got 2 worker processes",
    "--kv-file kv --host-kv-memory 1G --kv-transfer-config {}": "got a KV connector",
    "--kv-file kv --host-kv-memory 1G --speculative-config {}": "got speculative decoding",
    "--block-size 100": "block_size: expected a multiple of 16",
    "--kv-cache-dtype fp8": "kv_cache_dtype: expected bfloat16, as the model computes",
    "--kv-cache-dtype bfloat16 --dtype float32": "kv_cache_dtype: expected float32",
    "--config factors.json": "budget_factors: expected a factor for each of",
    "--config stream.json": 'dense_layers: expected none with extend="stream"',
    "{llama3} --extend yarn": 'got rope_type "llama3"',
    "{yarn} --extend yarn": "a model without YaRN",
    "{dynamic} --extend stream": 'got rope_type "dynamic"',
    "{gpt2} --extend stream": "got model type gpt2",
}
LAST_WORDS = [
    (
        "ValueError: To serve at least one request with the model's max seq len (8192), (0.5 GiB "
        "KV cache is needed, which is larger than the available KV cache memory (0.1 GiB). Try "
        "increasing `gpu_memory_utilization` or decreasing `max_model_len`.",
        FitError,
        "cache memory (0.1 GiB); raise --kv-cache-memory-bytes or lower --max-model-len",
    ),
    (
        "vllm serve: error: argument --max-model-len: invalid value: 'abc'",
        ArgumentError,
        "argument --max-model-len",
    ),
    ("  Value error, User-specified max_model_len (9) is greater", ArgumentError, "(9) is greater"),
    (
        "hipserve.errors.ConfigError: block_size: expected 256, got 48; use 256; or 512",
        ArgumentError,
        "block_size: expected 256, got 48; use 256; or 512",
    ),
    (
        "  Value error, meter: expected off, got 'sampled' [type=value_error, input_value=3]",
        ArgumentError,
        "meter: expected off, got 'sampled'",
    ),
    (
        "OSError: [Errno -2] Name or service not known",
        ArgumentError,
        "can fetch, got some/model ([Errno -2] Name or service not known); check the name",
    ),
    ("RuntimeError: no kernel", BackendError, "the server did not start: no kernel"),
]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Stands for the server that a command line would start."""
    monkeypatch.chdir(Path(__file__).parents[2])
    started: list[Server] = []
    monkeypatch.setattr(serve, "run", lambda server, verbose: started.append(server))
    app = typer.Typer()
    app.command(context_settings=serve.PASS_ON)(serve.serve)

    def run(*words: str) -> Server:
        words = (*words, "--port", str(free_port()))
        typer.main.get_command(app).main(list(words), standalone_mode=False)
        return started[-1]

    return run  # type: ignore[return-value]


@pytest.mark.parametrize(("words", "said"), REFUSED.items())
def test_flags_that_cannot_be_meant_are_refused_at_once(words: str, said: str, start) -> None:
    with pytest.raises(ArgumentError, match=re.escape(said)):
        start(*words.split())


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """The bundled model's config.json with other positions, and two configurations of HiP."""
    acorn = read_config("acorn")
    changes: dict[str, dict[str, object]] = {"gpt2": {"model_type": "gpt2"}}
    for kind in ("llama3", "yarn", "dynamic"):  # as checkpoints before transformers 5 have it
        changes[kind] = {"rope_parameters": None, "rope_scaling": {"type": kind, "factor": 2.0}}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(acorn | change))
    (tmp_path / "factors.json").write_text('{"budget_factors": [[1, 2, 3, 4, 5, 6, 7]]}')
    (tmp_path / "stream.json").write_text('{"extend": "stream", "dense_layers": 1}')
    return {name: str(tmp_path / name) for name in changes}


@pytest.mark.parametrize(("words", "said"), HALF_A_MINUTE_EARLY.items())
def test_settings_are_refused_before_an_engine_starts(
    words: str,
    said: str,
    start,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (serve, refusals):
        monkeypatch.setattr(module, "on_cpu", lambda: True)
    for name, path in models.items():
        words = words.replace(f"{{{name}}}", path)
    with pytest.raises(ArgumentError, match=re.escape(said)) as refused:
        start(*words.split())
    assert "vLLM takes" not in str(refused.value)


def test_dense_attention_takes_what_hip_does_not(start) -> None:
    assert start("--kv-cache-dtype", "fp8", "--block-size", "100", "--dense").config is None


def test_a_meter_is_refused_on_a_gpu(start, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (serve, refusals):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    with pytest.raises(ArgumentError, match='meter: expected "off" on a GPU'):
        start("--meter")


@pytest.mark.parametrize(("text", "said"), REFUSED_IN_A_FILE.items())
def test_so_is_what_stands_in_a_file_of_flags(text: str, said: str, tmp_path: Path, start) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=re.escape(said)):
        start("--config", str(path))


def test_vllm_reads_its_own_file_of_flags(tmp_path: Path, start) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text("max-model-len: 4096\nserved_model_name: mine\ntensor-parallel-size: 2\n")
    server = start("--config", str(path), "--preset", "paper")
    words = server.command()
    assert words[words.index("--config") + 1] == str(path)
    assert "--served-model-name" not in words
    assert server.num_workers == 2
    assert server.config == HiPConfig.preset("paper")


def test_no_flag_of_vllm_is_unknown() -> None:
    cli_args = pytest.importorskip("vllm.entrypoints.launchers.cli_args")  # 0.33 has it elsewhere
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = cli_args.make_arg_parser(FlexibleArgumentParser())
    names = [name for action in parser._actions for name in action.option_strings]
    assert len(names) > 300
    refusals.check_known(names)


@pytest.mark.parametrize(("line", "kind", "said"), LAST_WORDS)
def test_the_last_words_of_a_server_become_an_error(
    line: str, kind: type[HipserveError], said: str
) -> None:
    lines = ["INFO fine", line]
    error = log_words.refusal(log_words.complaint(lines), lines, "some/model", on_cpu=True)
    assert type(error) is kind
    assert said in str(error)
    assert "gpu_memory_utilization" not in str(error)


def test_a_prompt_as_long_as_the_context_is_refused_with_the_numbers() -> None:
    def count(max_model_len: int, max_tokens: int | None, input_length: int) -> int:
        return min(max_model_len - input_length, max_tokens or max_model_len)

    room = compat.leaving_room(count)
    assert room(100, 8, input_length=99) == 1
    with pytest.raises(ValueError, match=r"has 100 tokens, which is all of .* of 100.*--extend"):
        room(100, 1, input_length=100)
