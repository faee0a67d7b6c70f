"""Models beyond their trained length: how they turn keys, YaRN and streams in transformers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from hipserve import ArgumentError, FitError, HiPCache, HiPConfig
from hipserve.attention import layer
from hipserve.attention.dense import attend_chosen
from hipserve.integrations.extend import yarn_parameters
from hipserve.integrations.rope import read_rope
from hipserve.integrations.transformers import extend_positions
from hipserve.models import LoadedModel
from hipserve.models.loading import extended_length
from hipserve.ops.rope import turn
from tiny_models import PRUNED, SIZES, build

TRAINED = 192
STREAM = {**PRUNED, "extend": "stream", "trained_length": TRAINED}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
}
ROPES = {
    "theta": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    **{
        kind: (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **scaling}},
        )
        for kind, scaling in SCALINGS.items()
    },
    "neighbours, partial": ("GlmConfig", {}),
    "neighbours": ("CohereConfig", {}),
    "cut by the model": ("PhiConfig", {"num_key_value_heads": 4}),
    "a window's own": (
        "Gemma3TextConfig",
        {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "cosines of half a head": ("GptOssConfig", {"num_local_experts": 2}),
}


def turned_by_model(config: Any, x: Tensor, position: int) -> Tensor:
    """x `[head_dim]` at a position, by the model's own code, without its attention factor."""
    modeling = importlib.import_module(type(config).__module__.replace("configuration", "modeling"))
    name = next(n for n in vars(modeling) if n.endswith("RotaryEmbedding"))
    kind = {"layer_type": "full_attention"} if "Gemma3" in name else {}
    rotary = getattr(modeling, name)(config)
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.tensor([[position]]), **kind)
    factor = (cos**2 + sin**2).mean().sqrt()
    width = cos.shape[-1] if "Phi" in name else len(x)
    q = x[:width][None, None, None]
    apply = modeling.apply_rotary_pos_emb
    return torch.cat([apply(q, q, cos / factor, sin / factor)[0][0, 0, 0], x[width:]])


@pytest.mark.parametrize("kind", ROPES)
def test_a_model_turns_keys_as_we_read(kind: str) -> None:
    name, extra = ROPES[kind]
    config = getattr(transformers, name)(**{**SIZES, **extra})
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope, x = read_rope(config, head_dim), torch.randn(head_dim)
    for by in (1, 30, 500):
        moved = turn(turned_by_model(config, x, 100), by, rope)
        expected = turned_by_model(config, x, 100 + by)
        # The model's own angles are products in float32, of up to 600.
        torch.testing.assert_close(moved, expected, rtol=0, atol=600 * 2**-23 * 4)


@pytest.mark.parametrize(
    ("name", "extra", "got"),
    [
        ("GPT2Config", {}, "gpt2"),
        ("BloomConfig", {}, "bloom"),
        ("SmolLM3Config", {}, "smollm3"),
        ("Cohere2Config", {}, "cohere2"),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
        (
            "Qwen2Config",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                }
            },
            "M-RoPE",
        ),
    ],
)
def test_other_positions_are_refused(name: str, extra: dict[str, Any], got: str) -> None:
    with pytest.raises(ArgumentError, match=got):
        read_rope(getattr(transformers, name)(**extra), 16)


def logits_of(model: Any, ids: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """`[tokens, words]`, read in chunks with one `HiPCache`."""
    cache, out = HiPCache(model.config), list[Tensor]()
    with torch.no_grad():
        for chunk in ids.split(list(chunks), dim=1):
            out.append(model(chunk, past_key_values=cache).logits[0])
    return torch.cat(out)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_reads_on_beyond_its_trained_length(family: str) -> None:
    ids = torch.randint(0, 96, (1, 400))
    streaming, plain = build(family, STREAM), build(family, PRUNED)
    whole = logits_of(streaming, ids, (400,))
    without = logits_of(plain, ids, (400,))
    assert torch.equal(whole[:TRAINED], without[:TRAINED])
    assert not torch.allclose(whole[TRAINED:], without[TRAINED:], atol=1e-3)
    in_chunks = logits_of(streaming, ids, (160, 160, 80))
    torch.testing.assert_close(in_chunks, whole, rtol=0, atol=1e-3)


def test_pages_and_plain_tensors_stream_alike() -> None:
    ids = torch.randint(0, 96, (1, 300))
    model = build("llama", STREAM)
    whole = logits_of(model, ids, (300,))
    with torch.no_grad():
        dynamic = model(ids).logits[0]
    torch.testing.assert_close(dynamic, whole, rtol=0, atol=1e-3)
    model = build("llama", {**STREAM, "query_block_size": 1, "query_stride": 1})
    steps = logits_of(model, ids, (290, *[1] * 10))
    with torch.no_grad():
        ones = model(ids).logits[0]
    torch.testing.assert_close(steps[-10:], ones[-10:], rtol=0, atol=1e-3)


def test_dense_layers_are_dense_within_the_trained_length_only() -> None:
    ids = torch.randint(0, 96, (1, 400))
    every = [0, 1, 2]
    streaming = build("llama", {**STREAM, "dense_layers": every})
    dense = build("llama", {**PRUNED, "dense_layers": every})
    got, expected = logits_of(streaming, ids, (400,)), logits_of(dense, ids, (400,))
    torch.testing.assert_close(got[:TRAINED], expected[:TRAINED], rtol=0, atol=1e-4)
    assert not torch.allclose(got[TRAINED:], expected[TRAINED:], atol=1e-3)


def test_yarn_is_what_the_checkpoint_would_have() -> None:
    ids = torch.randint(0, 96, (1, 300))
    model = build("llama", attention="sdpa")
    own = model(ids).logits
    config = HiPConfig.from_dict({**PRUNED, "extend": "yarn", "extend_factor": 2.0})
    extend_positions(model, config)
    settings = transformers.LlamaConfig(**SIZES)
    settings.rope_parameters = yarn_parameters(settings, 2.0)
    torch.manual_seed(3)
    expected = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").float().eval()
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    assert not torch.allclose(model(ids).logits, own, atol=1e-3)
    extend_positions(model, None)
    assert torch.equal(model(ids).logits, own)
    with pytest.raises(ArgumentError, match="one with it"):
        yarn_parameters(settings, 2.0)


def test_the_context_grows_and_its_error_names_the_option() -> None:
    assert extended_length(HiPConfig(), 8192) == 8192
    assert extended_length(HiPConfig(extend="stream", extend_factor=2), 8192) == 16_384
    assert extended_length(HiPConfig(extend="yarn", trained_length=1000), 8192) == 4000
    loaded = LoadedModel(build("llama"), None, "tiny", 1024)
    with pytest.raises(FitError, match="--extend stream"):
        loaded.check_fit(2000, 64)


def test_steps_within_the_trained_length_take_the_kernels_of_models_that_do_not_extend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams: list[bool] = []

    def note(*args: Any, rope: Tensor | None, **options: Any) -> Any:
        streams.append(rope is not None)
        return attend_chosen(*args, rope=rope, **options)

    monkeypatch.setattr(layer, "attend_chosen", note)
    model, plain = build("llama", STREAM), build("llama", PRUNED)
    ids = torch.randint(3, 96, (1, TRAINED + 1))
    cache, other = HiPCache(model.config), HiPCache(plain.config)
    with torch.no_grad():
        got = model(ids[:, :-1], past_key_values=cache).logits
        assert set(streams) == {False}
        assert torch.equal(got, plain(ids[:, :-1], past_key_values=other).logits)
        streams.clear()
        model(ids[:, -1:], past_key_values=cache)
    assert set(streams) == {True}
