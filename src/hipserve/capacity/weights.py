"""Parameters of a decoder and their bytes, from the fields of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hipserve.errors import ArgumentError

if TYPE_CHECKING:
    from hipserve.capacity.shape import Family


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters, and how many bytes they take.

    Attributes:
        parameters: all of them.
        nbytes: that they take.
        fixed_bytes: of those that every step reads: all but embeddings and experts.
        expert_bytes: of all experts of all layers.
        num_experts, active_experts: of a layer, and those that a token passes; 0 without experts.
        width: channels inside the MLP that a token passes, all its experts together.
        quantised: how, as people read it; empty where nothing is.
    """

    parameters: int
    nbytes: float
    fixed_bytes: float
    expert_bytes: float = 0
    num_experts: int = 0
    active_experts: int = 0
    width: int = 0
    quantised: str = ""

    def read_by(self, sequences: int) -> float:
        """Bytes that a decode step of so many sequences reads: each chooses its own experts."""
        if not self.num_experts:
            return self.fixed_bytes
        unread = (1 - self.active_experts / self.num_experts) ** sequences
        return self.fixed_bytes + self.expert_bytes * (1 - unread)

    def part(self, cards: int) -> Weights:
        """Of one of so many cards that share each matrix; norms, which all have, are nothing."""
        nbytes, fixed, experts = (
            x / cards for x in (self.nbytes, self.fixed_bytes, self.expert_bytes)
        )
        return replace(self, nbytes=nbytes, fixed_bytes=fixed, expert_bytes=experts)

    def stage(self, share: float) -> Weights:
        """Of so many of the layers, and all embeddings."""
        fixed, experts = (share * x for x in (self.fixed_bytes, self.expert_bytes))
        embeddings = self.nbytes - self.fixed_bytes - self.expert_bytes
        nbytes = fixed + experts + embeddings
        return replace(self, nbytes=nbytes, fixed_bytes=fixed, expert_bytes=experts)


@dataclass(frozen=True, slots=True)
class Mlp:
    """The MLP of a layer: `count` experts of `active` that a token passes, or one of one.

    Attributes:
        width: channels inside one of them.
        linear, other: parameters in matrices of all experts; router and biases.
    """

    count: int
    active: int
    width: int
    linear: int
    other: int


def count_weights(
    config: Mapping[str, Any], family: Family, sizes: Mapping[str, int], item: int
) -> Weights:
    """The weights of the model that `config` describes, `item` bytes each unless quantised.

    Raises:
        ArgumentError: quantised in a way whose bytes are not known.
    """
    hidden, layers = sizes["hidden"], int(config["num_hidden_layers"])
    attention, beside = _attention(config, family, sizes)
    mlp = _mlp(config, family, hidden)
    embedding = sizes["vocabulary"] * hidden
    tied = bool(config.get("tie_word_embeddings", family.tied))
    name, bits, experts_only = _quantisation(config)
    linear = bits / 8 or item
    dense = item if experts_only else linear
    routed = mlp.count > 1
    expert_bytes = layers * mlp.linear * linear if routed else 0.0
    plain = layers * attention * dense + (0 if routed else layers * mlp.linear * dense)
    norms = layers * (beside + mlp.other + family.norms * hidden) + hidden
    fixed = plain + (norms + embedding) * item
    parameters = layers * (attention + mlp.linear) + norms + embedding * (1 if tied else 2)
    return Weights(
        parameters=parameters,
        nbytes=fixed + expert_bytes + (0 if tied else embedding * item),
        fixed_bytes=fixed,
        expert_bytes=expert_bytes,
        num_experts=mlp.count if routed else 0,
        active_experts=mlp.active if routed else 0,
        width=mlp.width * mlp.active,
        quantised=name,
    )


def _attention(
    config: Mapping[str, Any], family: Family, sizes: Mapping[str, int]
) -> tuple[int, int]:
    """Parameters of a layer's attention: in matrices, and biases, norms and sinks beside them."""
    hidden, heads, dim = sizes["hidden"], sizes["num_heads"], sizes["head_dim"]
    rows = (heads + 2 * sizes["num_kv_heads"]) * dim
    asked = bool(config.get("attention_bias", family.sinks))
    beside = rows if asked or family.qkv_bias else 0
    beside += hidden if asked else 0
    beside += 2 * dim if family.head_norms else 0
    beside += heads if family.sinks else 0
    return hidden * (rows + heads * dim), beside


def _mlp(config: Mapping[str, Any], family: Family, hidden: int) -> Mlp:
    count = int(config.get("num_local_experts") or config.get("num_experts") or 1)
    active = int(config.get("num_experts_per_tok") or config.get("experts_per_token") or 1)
    width = int(config.get("intermediate_size") or 4 * hidden)
    if count == 1:
        biases = 2 * width + hidden if config.get("mlp_bias") else 0
        return Mlp(1, 1, width, 3 * hidden * width, biases)
    width = int(config.get("moe_intermediate_size") or width)
    biases = count * (2 * width + hidden + 1) if family.biased_experts else 0
    return Mlp(count, active, width, count * 3 * hidden * width, count * hidden + biases)


def _quantisation(config: Mapping[str, Any]) -> tuple[str, float, bool]:
    """How matrices are quantised, bits of a weight with its scales (0: they are not), and whether
    only experts are."""
    how: Mapping[str, Any] = config.get("quantization_config") or {}
    method = str(how.get("quant_method", ""))
    if not how:
        return "", 0, False
    if method in ("awq", "gptq"):
        return method, _grouped(int(how.get("bits", 4)), how.get("group_size"), zeros=True), False
    if method == "bitsandbytes":
        return method, 4.5 if how.get("load_in_4bit") else 8, False
    if method in ("fp8", "fbgemm_fp8"):
        return method, 8, False
    if method == "mxfp4":
        return method, 4.25, True
    if method == "compressed-tensors":
        groups: Mapping[str, Any] = how.get("config_groups") or {}
        weights = [group["weights"] for group in groups.values() if group.get("weights")]
        if weights:
            bits = int(weights[0].get("num_bits", 8))
            return method, _grouped(bits, weights[0].get("group_size"), zeros=False), False
    expected = "none, or awq, gptq, bitsandbytes, fp8, mxfp4 or compressed-tensors"
    raise ArgumentError("quantization_config", expected, repr(method))


def _grouped(bits: int, group_size: object, *, zeros: bool) -> float:
    """Bits of a weight with its share of a 16-bit scale, and of a zero point."""
    if not isinstance(group_size, int) or group_size < 1:
        return bits
    return bits + (16 + (bits if zeros else 0)) / group_size
