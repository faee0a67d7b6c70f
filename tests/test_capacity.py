"""What fits where: against models that transformers builds, tensors that layouts make, and laws."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hipserve import ArgumentError, HiPConfig
from hipserve.capacity.advice import HIT_RATIOS, Machine, Plan
from hipserve.capacity.cards import CARDS, find_card, recognise
from hipserve.capacity.memory import BLOCK, Room, Service
from hipserve.capacity.shape import FAMILIES, ModelShape
from hipserve.capacity.speed import keys_read, step_bytes, tokens_per_second
from hipserve.config import IndexForm
from hipserve.models.config_file import read_config
from hipserve.offload import TILE_SIZE
from hipserve.ops.write_kv.layout import IndexLayout
from hipserve.plan import pruning_rule
from hipserve.plan.parts import aligned, index_bytes

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 24},
    "gemma3_text": {"head_dim": 32},
    "llama": {"attention_bias": True, "mlp_bias": True},
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}


def shape(**changes: Any) -> ModelShape:
    return ModelShape.of({**LLAMA_8B, **changes})


def service(context: int = 131072, **changes: Any) -> Service:
    return replace(Service(shape(), HiPConfig(), context), **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_as_transformers_builds_it(family: str) -> None:
    config = CONFIG_MAPPING[family](**TINY, **OWN.get(family, {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    table = json.loads(config.to_json_string())
    found = ModelShape.of(table)
    assert found.weights.parameters == sum(x.numel() for x in model.parameters())
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * 6
    if family != "mistral":
        assert [w is None for w in found.windows] == [kind == "full_attention" for kind in kinds]
    hub = {key: value for key, value in table.items() if key != "layer_types"}
    assert ModelShape.of(hub).windows == found.windows
    assert found.head_dim == (getattr(config, "head_dim", None) or 16)


def test_weights_of_the_bundled_model_are_those_of_its_files() -> None:
    from hipserve.models import bundled_path

    index = json.loads((bundled_path() / "model.safetensors.index.json").read_text("utf-8"))
    found = ModelShape.of(read_config("acorn"))
    assert found.weights.nbytes == index["metadata"]["total_size"]
    assert (found.num_kv_heads, found.head_dim, found.positions) == (2, 64, 131072)


def test_windows_follow_the_fields_of_older_files() -> None:
    mistral = {"model_type": "mistral", "sliding_window": 4096}
    assert shape(**mistral).windows == (4096,) * 32
    assert shape(**{**mistral, "sliding_window": None}).windows == (None,) * 32
    qwen = {"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 28}
    assert shape(**qwen).windows == (None,) * 32
    assert shape(**qwen, use_sliding_window=True).windows == (None,) * 28 + (4096,) * 4
    gemma = {"model_type": "gemma3_text", "sliding_window": 1024, "num_hidden_layers": 7}
    assert shape(**gemma).windows == (*(1024,) * 5, None, 1024)
    assert shape(**gemma, sliding_window_pattern=2).windows == (1024, None) * 3 + (1024,)
    outer = {"model_type": "gemma3", "vision_config": {}, "text_config": {**LLAMA_8B, **gemma}}
    seen = ModelShape.of(outer)
    assert (seen.family, seen.full_layers) == ("gemma3_text", 1)
    assert seen.notes == ("what reads images is not counted",)


@pytest.mark.parametrize(
    ("how", "bits"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "fp8"}, 8),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 64}}},
            },
            4 + 16 / 64,
        ),
    ],
)
def test_quantised_matrices_take_their_bits(how: dict[str, Any], bits: float) -> None:
    plain, found = shape().weights, shape(quantization_config=how).weights
    matrices = 32 * (4096 * 128 * (32 + 2 * 8 + 32) + 3 * 4096 * 14336)
    rest = plain.nbytes - 2 * matrices
    assert found.nbytes == pytest.approx(rest + matrices * bits / 8)
    assert (found.quantised, found.parameters) == (how["quant_method"], plain.parameters)


def test_experts_are_counted_whole_and_read_in_part() -> None:
    """openai/gpt-oss-20b: its card says 20.9 B parameters, 12.8 GiB of checkpoint."""
    weights = ModelShape.of(GPT_OSS_20B).weights
    assert weights.parameters == pytest.approx(20.9e9, rel=0.003)
    assert weights.nbytes / 2**30 == pytest.approx(12.8, rel=0.01)
    experts = weights.read_by(1) - weights.fixed_bytes
    assert experts == pytest.approx(weights.expert_bytes * 4 / 32)
    assert weights.read_by(1) < weights.read_by(2) < weights.read_by(1000) < weights.nbytes
    assert shape().weights.read_by(1) == shape().weights.read_by(64)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kv_lora_rank": 512}, "one with latent attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "one with recurrent layers"),
        ({"mamba_d_state": 16}, "one with recurrent layers"),
        ({"is_encoder_decoder": True}, "one with an encoder"),
        ({"model_type": "bert"}, "one with an encoder"),
        ({"model_type": "distilbert"}, "one with an encoder"),
        ({"architectures": ["NewForMaskedLM"]}, "one with an encoder"),
        ({"hidden_size": None}, "hidden_size, a whole number, got nothing"),
        ({"num_attention_heads": "many"}, "num_attention_heads, a whole number, got 'many'"),
        ({"quantization_config": {"quant_method": "own"}}, "compressed-tensors, got 'own'"),
    ],
)
def test_other_models_are_refused_by_what_they_have(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        shape(**changes)


def test_a_family_that_is_not_known_is_counted_and_said() -> None:
    assert shape().notes == ()
    found = shape(model_type="lama")
    assert found.weights == shape().weights
    assert found.notes[0].startswith("lama is not among the families counted: its weights as")
    assert "served with HiP attention is not known" in found.notes[0]


@pytest.mark.parametrize("code_bits", [4, 8, 16])
@pytest.mark.parametrize("run_size", [None, 16, 32])
@pytest.mark.parametrize("page_size", [16, 96, 128, 256])
@pytest.mark.parametrize("keys", [0, 2**23])
def test_bytes_of_an_index_are_those_of_its_tensors(
    page_size: int, run_size: int | None, code_bits: int, keys: int
) -> None:
    if run_size is not None and page_size % run_size:
        return
    form, heads, dim = IndexForm(run_size, code_bits), 3, 80
    layout = IndexLayout.of_pages(page_size, dim, torch.float16, form, keys)
    made = layout.empty_like(torch.empty(1, page_size, heads, dim, dtype=torch.float16))
    counted = index_bytes(page_size, heads, dim, key_bytes=2, form=form, keys=keys)
    assert counted == sum(aligned(x.nbytes) for x in made.tensors())
    assert layout.nbytes * heads == sum(x.nbytes for x in made.tensors())


def test_the_sum_for_the_8b_shape() -> None:
    parts = service().parts()
    rows = 131072 + BLOCK
    assert parts.keys_values == rows * 32 * 2 * 8 * 128 * 2
    assert parts.index == rows // BLOCK * 32 * 8 * 18 * 2 * 128 * 2
    assert parts.weights == 2 * 8_030_261_248
    assert parts.device == sum(
        (parts.weights, parts.keys_values, parts.index, parts.activations, parts.reserve)
    )
    dense = service(config=None).parts()
    assert (dense.index, dense.keys_values) == (0, parts.keys_values)


def test_offload_moves_keys_and_leaves_the_index() -> None:
    """The floor is what one decode step reads: sinks, chosen blocks and its window."""
    config = HiPConfig(code_bits=4)
    resident, there = (service(config=config, offload=x) for x in (False, True))
    before, after = resident.parts(), there.parts()
    assert (after.pool, after.keys_values) == (before.keys_values, 0)
    assert (after.index, after.weights) == (before.index, before.weights)
    slot = 8 * (2 * TILE_SIZE * 128 * 2 + 16)  # keys, values, and 16 bytes of what it is
    assert after.arena == there.step_tiles * 32 * slot
    apart = replace(there, config=config.replace(share_group=False))
    assert apart.arena_floor == 4 * after.arena  # every head of a group has tiles of its own
    assert after.table == 32 * there.tokens // 256 * 4 * (8 * 256 // TILE_SIZE + 2)
    assert after.staging == 2 * 131072 * 2 * 8 * 128 * 2  # two layers
    rule = pruning_rule(config.replace(decode_dense_below=0), "cuda")
    read = []
    for position in range(60_000, 60_064):
        first = rule.window_start(position, 1) // TILE_SIZE
        read.append(
            config.num_sink_tokens // TILE_SIZE
            + config.max_selected
            + position // TILE_SIZE
            - first
        )
    assert max(read) + 1 == there.step_tiles
    many = replace(there, sequences=3)
    assert many.arena_floor == 3 * there.arena_floor
    cpu = replace(there, on_gpu=False).parts()
    assert (cpu.arena, cpu.table, cpu.staging, cpu.pool) == (0, 0, 0, after.pool)


def test_layers_with_a_window_keep_their_window() -> None:
    model = shape(model_type="gemma3_text", sliding_window=1024, num_hidden_layers=12)
    short, long = (
        replace(service(context), model=model).parts().windows for context in (512, 2**20)
    )
    assert short == 10 * 512 * model.row_bytes
    assert long == 10 * (math.ceil((1023 + 2048) / BLOCK) + 1) * BLOCK * model.row_bytes


@settings(max_examples=40, deadline=None)
@given(
    device=st.integers(18, 140),
    host=st.integers(1, 400),
    sequences=st.integers(1, 9),
    blocks=st.integers(1, 4096),
    offload=st.booleans(),
)
def test_what_fits_is_the_most_that_fits(
    device: int, host: int, sequences: int, blocks: int, offload: bool
) -> None:
    room = Room(device << 30, host << 30)
    config = HiPConfig(code_bits=8)
    wanted = service(blocks * BLOCK, sequences=sequences, offload=offload, config=config)
    longest, most = room.longest_context(wanted), room.most_sequences(wanted)
    assert not room.holds(replace(wanted, context=longest + 1))
    assert not longest or room.holds(replace(wanted, context=longest))
    assert not room.holds(replace(wanted, sequences=most + 1))
    assert not most or room.holds(replace(wanted, sequences=most))
    assert room.holds(wanted) == (longest >= wanted.context) == (most >= sequences)


def test_a_step_reads_what_the_pruning_rule_says() -> None:
    config = HiPConfig()
    assert keys_read(service(20_000), config) == 20_000
    pruned = keys_read(service(), config)
    assert 1600 <= pruned < 1600 + 16
    assert keys_read(service(20_000, offload=True), config) < 1616
    assert keys_read(service(1000, offload=True), config) == 1000
    dense, sparse = step_bytes(service(config=None)), step_bytes(service())
    assert (dense.keys_values, dense.index) == (131072 * 131072, 0)
    assert sparse.keys_values == pruned * 131072
    assert sparse.weights == dense.weights == 2 * (8_030_261_248 - 4096 * 128256)
    often = step_bytes(service(config=HiPConfig(refresh_interval=8)))
    assert often.index == sparse.index / 8
    tree = step_bytes(service(config=HiPConfig(selector="tree")))
    assert 0 < tree.index < 131072 * 131072 / 2
    coded = step_bytes(service(config=HiPConfig(code_bits=4)))
    assert coded.index < sparse.index / 2


def test_a_search_reads_all_coarse_runs_kept_fine_ones_and_their_keys() -> None:
    heads = 32 * 8
    coarse, fine, keys = 131072 // 128, (6 * 4096 // 128) * 8, 4096
    assert step_bytes(service()).index == heads * ((coarse + fine) * 2 * 128 * 2 + keys * 128 * 2)


def test_a_search_in_millions_of_keys_begins_with_long_runs() -> None:
    """A few more runs than in 131,072 keys, and one more summary for every 256 keys."""
    length, heads = 4 << 20, 32 * 8
    long, coarse, fine, keys = length // 4096, 128 * 32, (6 * 4096 // 128) * 8, 4096
    runs = (long + coarse + fine) * 2 * 128 * 2
    assert step_bytes(service(length)).index == heads * (runs + keys * 128 * 2)
    parts = service(length).parts()
    assert parts.index == parts.keys_values * 19 // 256


def test_speed_is_bandwidth_over_bytes() -> None:
    card = CARDS["h100-80g"]
    read = step_bytes(service()).total
    assert tokens_per_second(service(), card.bandwidth) == pytest.approx(3.35e12 / read)
    plan = Plan(service(), Machine(card.title, int(card.memory), card=card), Room(1, 1))
    assert list(plan.speeds()) == ["resident"]
    away = replace(plan, service=service(offload=True, config=HiPConfig(code_bits=4)))
    slow, middle, fast = away.speeds().values()
    assert slow < middle < fast
    there = step_bytes(away.service)
    seconds = there.total / 3.35e12 + 0.1 * there.keys_values / card.link
    assert slow == pytest.approx(1 / seconds)
    assert tuple(map(float, away.speeds())) == HIT_RATIOS
    assert replace(plan, machine=Machine("a card", 1)).speeds() == {}


def test_cards_are_found_by_name() -> None:
    assert find_card("h200") is CARDS["h200-141g"]
    assert find_card("a100-40g").memory == 40e9
    for name, hint in (("h20", "mean h200?"), ("a100", "mean a100"), ("tpu", "--device-mem")):
        with pytest.raises(ArgumentError, match="gpu: expected one of b200") as caught:
            find_card(name)
        assert hint in caught.value.hint
    drivers = {
        "h100-80g": ("NVIDIA H100 80GB HBM3", 81_559),
        "h100-pcie-80g": ("NVIDIA H100 PCIe", 81_559),
        "h200-141g": ("NVIDIA H200", 143_771),
        "a100-40g": ("NVIDIA A100-SXM4-40GB", 40_960),
        "l4-24g": ("NVIDIA L4", 23_034),
        "l40s-48g": ("NVIDIA L40S", 46_068),
        "rtx4090-24g": ("NVIDIA GeForce RTX 4090", 24_564),
    }
    for key, (name, mebibytes) in drivers.items():
        assert recognise(name, mebibytes << 20) is CARDS[key]
    assert recognise("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9_984 << 20) is None
    for name, card in CARDS.items():
        assert name.endswith(f"-{card.memory / 1e9:.0f}g")
        assert card.link < card.bandwidth
