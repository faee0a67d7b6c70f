"""GGUF files: the same tokens and logits as the checkpoint that they were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hipserve import ArgumentError
from hipserve.models import Conversation, bundled_path, load
from hipserve.models.gguf_files import find_gguf
from hipserve.models.gguf_tokenizer import end_ids, make_tokenizer
from hipserve.platform import cpu_multiplies

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytest.importorskip("accelerate", reason="the extra gguf is not installed")

TEXT = "The  caf\u00e9's 12345 rivers\n\n run<|eot_id|> to\tthe sea, \u6f22\u5b57 \U0001f642!"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}


def model(**changes: Any) -> Any:
    """One layer of random weights, with the bundled model's vocabulary."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=1024, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write(path: Path, source: Any, **extra: Any) -> Path:
    """`source` as llama.cpp's converter writes it, float32, with the bundled tokenizer."""
    out = gguf.GGUFWriter(str(path), "llama")
    config = source.config
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    for key, value in tokenizer_fields().items():
        add = {bool: out.add_bool, str: out.add_string, int: out.add_uint32, list: out.add_array}
        add[type(value)](key, value)
    for key, value in extra.items():
        if isinstance(value, torch.Tensor):
            out.add_tensor(key, value.numpy())
        else:
            name = key.replace("__", ".")
            add = {str: out.add_string, float: out.add_float32, int: out.add_uint32}
            add[type(value)](name, value)
    for name, weight in source.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((n for part, n in heads.items() if part in name), None)
        out.add_tensor(gguf_name(name), interleaved(weight, count).numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def gguf_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleaved(weight: torch.Tensor, heads: int | None) -> torch.Tensor:
    """GGUF rotates neighbouring channels, transformers the two halves of a head."""
    if heads is None:
        return weight
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).contiguous()


def tokenizer_fields() -> dict[str, Any]:
    made = json.loads((bundled_path() / "tokenizer.json").read_text())
    tokens = sorted(made["model"]["vocab"], key=made["model"]["vocab"].get)
    control = {token["content"] for token in made["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in made["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model())


def test_the_same_tokens_and_logits_as_the_checkpoint(path: Path) -> None:
    loaded = load(str(path), device="cpu", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(bundled_path())(TEXT, return_tensors="pt")["input_ids"]
    assert torch.equal(loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"], ids)
    assert loaded.tokenizer.decode(ids[0, 1:]) == TEXT
    with torch.no_grad():
        expected, got = model()(ids).logits, loaded.model(ids).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert loaded.max_context == 1024
    assert loaded.model.config._attn_implementation == "hip"


def test_the_ends_of_answers_are_the_files(path: Path) -> None:
    """transformers' loader takes the first token for the last one."""
    loaded = load(str(path), device="cpu")
    assert (loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id) == (0, 1)
    assert loaded.tokenizer.pad_token_id == 2
    eot = loaded.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert loaded.model.generation_config.eos_token_id == [1, eot]
    own = torch.bfloat16
    assert loaded.model.dtype == (own if cpu_multiplies(own) else torch.float32)
    assert loaded.encode([{"role": "user", "content": "x"}]).shape[1] > 1


def test_a_folder_with_one_file_talks(path: Path) -> None:
    talk = Conversation(load(str(path.parent), device="cpu"))
    talk.say("one")
    assert isinstance(talk.ask("two", max_new_tokens=4), str)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_positions_are_scaled(kind: str, tmp_path: Path) -> None:
    """As metadata, or (Llama 3.1) as a tensor of factors: the loader drops both."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    extra: dict[str, Any] = {
        "llama__rope__scaling__type": kind,
        "llama__rope__scaling__factor": 4.0,
        "llama__rope__scaling__original_context_length": 256,
    }
    if kind != "linear":
        rope["original_max_position_embeddings"] = 256
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    source = model(rope_parameters=rope)
    if kind == "llama3":
        plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
        extra = {"rope_freqs.weight": plain / source.model.rotary_emb.inv_freq}
    loaded = load(
        str(write(tmp_path / "scaled.gguf", source, **extra)), device="cpu", dtype=torch.float32
    )
    ids = torch.randint(3, 8192, (1, 700))
    with torch.no_grad():
        expected, got = source(ids).logits, loaded.model(ids).logits
        assert not torch.allclose(model()(ids).logits, expected, atol=1e-3)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path) -> None:
    scaling = {"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 2.0}
    with pytest.raises(ArgumentError, match="none, linear or yarn, got longrope"):
        load(str(write(tmp_path / "a.gguf", model(), **scaling)), device="cpu")
    fields = tokenizer_fields()
    with pytest.raises(ArgumentError, match="got 'tekken'"):
        make_tokenizer({**fields, "tokenizer.ggml.pre": "tekken"})
    with pytest.raises(ArgumentError, match="of kind gpt2 or llama, got 't5'"):
        make_tokenizer({**fields, "tokenizer.ggml.model": "t5"})
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    with pytest.raises(ArgumentError, match="GGUF magic invalid"):
        load(str(broken), device="cpu")


def test_pieces_are_merged_by_their_scores() -> None:
    """SentencePiece: bytes where no piece fits, spaces as they were, digits apart."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["\u2581", "t", "h", "e", "th", "he", "the", "\u2581the", "<end_of_turn>"]
    ranks = {"th": -2.0, "he": -1.0, "the": -3.0, "\u2581the": -4.0}
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [ranks.get(piece, -9.0) for piece in pieces],
        "tokenizer.ggml.token_type": [3, 3, 3, 2, *[6] * 256, *[1] * 8, 3],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = make_tokenizer(fields)
    ids = tokenizer("the the h\u00e9<end_of_turn>")["input_ids"]
    expected = ["<bos>", "the", "\u2581the", "\u2581", "h", "<0xC3>", "<0xA9>", "<end_of_turn>"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the the h\u00e9"
    assert end_ids(fields) == [1, pieces.index("<end_of_turn>")]
    prefixed = make_tokenizer({**fields, "tokenizer.ggml.add_space_prefix": True})
    assert prefixed.convert_ids_to_tokens(prefixed("the")["input_ids"]) == ["<bos>", "\u2581the"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"), "--merge m-00001-of-00002.gguf"),
        (("m.gguf.part00", "m.gguf.part01"), r"cat m.gguf.\* > m.gguf"),
        (("a.gguf", "b.gguf"), r"2 in .* \(a.gguf, b.gguf\); name the file"),
    ],
)
def test_several_files_are_refused_by_name(
    names: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ArgumentError, match=message):
        find_gguf(tmp_path)
    if "name the file" not in message:
        with pytest.raises(ArgumentError, match=message):
            load(str(tmp_path / names[1]))


def test_a_file_that_is_not_there() -> None:
    for name in ("m.gguf", "./m.gguf", "/no/m.gguf"):
        with pytest.raises(ArgumentError, match="no such file"):
            load(name)


def test_the_server_says_that_it_reads_none(path: Path) -> None:
    from typer.testing import CliRunner

    from hipserve.cli.main import app

    error = CliRunner().invoke(app, ["serve", str(path)]).exception
    assert isinstance(error, ArgumentError)
    assert "vLLM reads no GGUF" in str(error)
