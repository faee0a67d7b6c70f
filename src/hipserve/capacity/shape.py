"""The shape of a model, from the fields of its config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from hipserve.capacity.weights import Weights, count_weights
from hipserve.errors import ArgumentError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Family(NamedTuple):
    """What config.json of a `model_type` leaves out: defaults of transformers' classes.

    Attributes:
        tied: the head is the embedding.
        head_dim: of a head; None for hidden_size / num_attention_heads.
        qkv_bias: queries, keys and values have a bias.
        head_norms: queries and keys of each head are normalised.
        sinks: every head has a learned sink.
        norms: of a layer.
        period: of so many layers all but the last have a window; 0 where all or none have.
        biased_experts: experts and their router have biases.
    """

    tied: bool = False
    head_dim: int | None = None
    qkv_bias: bool = False
    head_norms: bool = False
    sinks: bool = False
    norms: int = 2
    period: int = 0
    biased_experts: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "granite": Family(),
    "phi3": Family(),
    "smollm3": Family(tied=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_dim=128, head_norms=True),
    "qwen3_moe": Family(head_norms=True),
    "gemma": Family(tied=True, head_dim=256),
    "gemma2": Family(tied=True, head_dim=256, norms=4, period=2),
    "gemma3_text": Family(tied=True, head_dim=256, head_norms=True, norms=4, period=6),
    "gpt_oss": Family(head_dim=64, qkv_bias=True, sinks=True, period=2, biased_experts=True),
}
"""By `model_type`; `tests/test_capacity.py` counts each as transformers builds it."""

WINDOWED_ON_REQUEST = ("qwen2", "qwen3", "qwen3_moe", "smollm3")
"""Their `sliding_window` counts where `use_sliding_window` is set."""

ENCODERS = ("bert", "roberta", "electra", "deberta", "deberta-v2", "mpnet", "clip", "vit", "xlnet")
"""How the `model_type` of an encoder ends: distilbert and modernbert too."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder, as far as memory and bandwidth care.

    Attributes:
        family: `model_type`.
        hidden: channels between layers.
        intermediate: channels inside the MLP that a token passes, all its experts together.
        num_heads, num_kv_heads, head_dim: of attention.
        windows: one entry a layer: keys of its sliding window, or None where it reads everything.
        vocabulary: tokens.
        positions: that the model was made for.
        dtype: of activations.
        cache_dtype: of keys and values, as vLLM calls it; `auto` for that of activations.
        weights: parameters and their bytes.
        notes: what was assumed.
    """

    family: str
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    vocabulary: int
    positions: int
    dtype: str
    weights: Weights
    notes: tuple[str, ...] = ()
    cache_dtype: str = "auto"

    @property
    def itemsize(self) -> int:
        """Bytes of a number of an activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def key_bytes(self) -> int:
        """Bytes of a number of a key."""
        return 1 if self.cache_dtype.startswith("fp8") else self.itemsize

    @property
    def full_layers(self) -> int:
        """Layers without a window, which HiP attention prunes."""
        return self.windows.count(None)

    @property
    def row_bytes(self) -> int:
        """Keys and values of a token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.key_bytes

    def part(self, cards: int) -> ModelShape:
        """What one of so many cards has under tensor parallelism: its heads, and its channels of
        the MLP. Where there are more cards than KV heads, several have the same one.

        Raises:
            ArgumentError: the heads cannot be shared so.
        """
        kv = self.num_kv_heads
        if self.num_heads % cards or (kv % cards and cards % kv):
            expected = f"a number that divides {self.num_heads} query and {kv} KV heads"
            raise ArgumentError("tensor_parallel_size", expected, str(cards))
        return replace(
            self,
            intermediate=-(-self.intermediate // cards),
            num_heads=self.num_heads // cards,
            num_kv_heads=max(kv // cards, 1),
            vocabulary=-(-self.vocabulary // cards),
            weights=self.weights.part(cards),
        )

    def stage(self, stages: int) -> ModelShape:
        """The largest of so many stages of a pipeline, with embeddings or head."""
        layers = -(-len(self.windows) // stages)
        weights = self.weights.stage(layers / len(self.windows))
        return replace(self, windows=self.windows[:layers], weights=weights)

    @classmethod
    def of(cls, config: Mapping[str, Any], dtype: str = "auto") -> ModelShape:
        """The shape that a config.json describes; of a model that sees, its text model.

        Args:
            config: the file's table.
            dtype: of weights that are not quantised; `auto` is the checkpoint's own.

        Raises:
            ArgumentError: it describes no decoder of the kind that HiP attention runs.
        """
        text = config.get("text_config")
        own: dict[str, Any] = {**config, **text} if isinstance(text, dict) else dict(config)
        kind = str(own.get("model_type", "unknown"))
        family = FAMILIES.get(kind, Family())
        _refuse_other_kinds(own)
        dtype = _dtype(own) if dtype == "auto" else dtype
        heads = _number(own, "num_attention_heads")
        hidden = _number(own, "hidden_size")
        sizes: dict[str, Any] = {
            "hidden": hidden,
            "num_heads": heads,
            "num_kv_heads": int(own.get("num_key_value_heads") or heads),
            "head_dim": int(own.get("head_dim") or family.head_dim or hidden // heads),
            "vocabulary": _number(own, "vocab_size"),
        }
        windows = _windows(own, kind, family)
        weights = count_weights(own, family, sizes, DTYPE_BYTES[dtype])
        return cls(
            family=kind,
            intermediate=weights.width,
            windows=windows,
            positions=int(own.get("max_position_embeddings") or 0),
            dtype=dtype,
            weights=weights,
            notes=_notes(config, kind),
            **sizes,
        )


def _notes(config: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    notes: list[str] = []
    if kind not in FAMILIES:
        notes.append(
            f"{kind} is not among the families counted: its weights as Llama's; whether it can be "
            "served with HiP attention is not known"
        )
    if "vision_config" in config:
        notes.append("what reads images is not counted")
    return tuple(notes)


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, int) and value > 0:
        return value
    got = "nothing" if value is None else repr(value)
    raise ArgumentError("config.json", f"{name}, a whole number", got)


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    kinds = set(cast("Sequence[str]", config.get("layer_types") or ()))
    reasons = {
        "latent attention": config.get("kv_lora_rank"),
        "an encoder": config.get("is_encoder_decoder") or _is_encoder(config),
        "recurrent layers": any(not kind.endswith("attention") for kind in kinds)
        or "linear_attention" in kinds
        or any(str(key).startswith(("mamba_", "ssm_")) for key in config),
    }
    for reason in (name for name, found in reasons.items() if found):
        expected = "a decoder whose layers keep keys and values of every token"
        raise ArgumentError("model", expected, f"one with {reason}")


def _is_encoder(config: Mapping[str, Any]) -> bool:
    """It reads a text in both directions and continues none."""
    kind = str(config.get("model_type", ""))
    made_for = cast("Sequence[str]", config.get("architectures") or ())
    masked = any(name.endswith("ForMaskedLM") for name in made_for)
    return masked or (kind.endswith(ENCODERS) and not config.get("is_decoder"))


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return name if name in DTYPE_BYTES else "bfloat16"


def _windows(config: Mapping[str, Any], kind: str, family: Family) -> tuple[int | None, ...]:
    layers = _number(config, "num_hidden_layers")
    window = config.get("sliding_window")
    on = config.get("use_sliding_window", kind not in WINDOWED_ON_REQUEST)
    if not window or not on:
        return (None,) * layers
    kinds = config.get("layer_types")
    period = int(config.get("sliding_window_pattern") or family.period)
    first = int(config.get("max_window_layers") or 0) if kind in WINDOWED_ON_REQUEST else 0
    if kinds:
        windowed = [name != "full_attention" for name in kinds]
    elif period:
        windowed = [(i + 1) % period != 0 for i in range(layers)]
    else:
        windowed = [i >= first for i in range(layers)]
    return tuple(int(window) if there else None for there in windowed)
