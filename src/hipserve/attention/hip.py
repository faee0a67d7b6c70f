"""`hip_attention`: HiP attention of whole, contiguous sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, overload

import torch
from torch import Tensor

from hipserve.attention.crossover import rule_of_whole
from hipserve.attention.inference import without_gradient
from hipserve.attention.layer import AttentionLayer
from hipserve.attention.meter import Meter
from hipserve.config import DEFAULT, HiPConfig, IndexForm
from hipserve.errors import ArgumentError
from hipserve.ops import build_index, checks
from hipserve.plan import BatchLayout
from hipserve.types import KeyIndex, KeyPool

_Q_DIMS = "[batch, query_len, num_q_heads, head_dim]"
_KV_DIMS = "[batch, kv_len, num_kv_heads, head_dim]"


@overload
def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: HiPConfig | None = None,
    causal: bool = True,
    sm_scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
    meter: Meter | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: HiPConfig | None = None,
    causal: bool = True,
    sm_scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
    meter: Meter | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: HiPConfig | None = None,
    causal: bool = True,
    sm_scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
    meter: Meter | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Hierarchically pruned attention (arXiv 2406.09827), in the layout of `flash_attn_func`.

    The index of `k` is built in every call. For a single row that costs more than it saves, so such
    a row reads all keys unless `config.dense_below` says from where to prune. Where keys stay
    (`HiPCache`, an engine's pages), their index stays too.

    >>> import torch, hipserve
    >>> q = torch.randn(1, 4096, 8, 64, dtype=torch.bfloat16)
    >>> k, v = torch.randn(2, 1, 4096, 2, 64, dtype=torch.bfloat16)
    >>> hipserve.hip_attention(q, k, v).shape
    torch.Size([1, 4096, 8, 64])

    Args:
        q: `[batch, query_len, num_q_heads, head_dim]`; the rows are the last positions.
        k, v: `[batch, kv_len, num_kv_heads, head_dim]`, query_len <= kv_len; q's dtype (bfloat16,
            float16, float32, and float64 with the reference) and device.
        config: what is kept; the measured defaults if None.
        causal: must be True: HiP prunes causal attention.
        sm_scale: factor of q.k; `head_dim ** -0.5` if None.
        softcap: c > 0 turns a scaled score s into c * tanh(s / c).
        backend: `auto`, `cpu`, `triton` or `reference`.
        meter: estimates what a few rows leave unread: `Meter(0)` before, `meter.mass.mean` after.
        return_lse: also return the log-sum-exp.

    Returns:
        out like q; with `return_lse` also lse `[batch, query_len, num_q_heads]`, float32
        (float64 for float64).

    Raises:
        ArgumentError: an argument does not fit; the message names it.
        BackendError: the backend asked for cannot run.
    """
    config = DEFAULT if config is None else config
    _check(config, causal, sm_scale, softcap)
    check_whole(q, k, v)
    if q.numel() == 0:
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        return (torch.empty_like(q), lse) if return_lse else torch.empty_like(q)
    rule = rule_of_whole(config, q, k.shape[2])
    layer = AttentionLayer(
        config, rule, sm_scale=sm_scale, softcap=softcap, backend=backend, meter=meter
    )
    keys = WholeKeys(k, v, q.shape[1], layer.index_form, backend)
    out, lse = layer.forward_batch(q, keys, head=not return_lse)
    if backend != "reference":  # eager torch has gradients
        out = without_gradient(out, q, k, v)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


@dataclass(frozen=True, slots=True)
class WholeKeys:
    """Whole, contiguous sequences, each of them one page: `LayerKeys`.

    Attributes:
        k, v: `[batch, kv_len, num_kv_heads, head_dim]`.
        query_len: rows of each sequence, its last positions.
        form: what a search reads of the keys.
        backend: builds the index.
    """

    k: Tensor
    v: Tensor
    query_len: int
    form: IndexForm
    backend: str = "auto"

    def append(self) -> None:
        """The keys stay where the caller has them."""

    @property
    def layout(self) -> BatchLayout:
        return whole_sequences(self.k.shape[0], self.query_len, self.k.shape[1], self.k.device)

    @property
    def fresh(self) -> tuple[Tensor, Tensor] | None:
        return (self.k, self.v) if self.k.shape[1] == self.query_len else None

    @property
    def index(self) -> KeyIndex:
        return build_index(self.k, **self.form._asdict(), backend=self.backend)

    def fetch(self, *_: object) -> KeyPool:
        return KeyPool(self.k, self.v)


def whole_sequences(batch: int, query_len: int, kv_len: int, device: torch.device) -> BatchLayout:
    """The layout of a batch of equally long sequences, each of them one page.

    It is made from these numbers: nothing is read back from the device, and torch.compile can trace
    it.
    """
    pages = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    return BatchLayout.of(pages, [kv_len] * batch, [query_len] * batch)


def _check(config: HiPConfig, causal: bool, sm_scale: float | None, softcap: float) -> None:
    checks.require(causal is True, "causal", "True", causal, "use dense attention otherwise")
    kind = isinstance(cast("object", config), HiPConfig)
    checks.require(kind, "config", "a HiPConfig", type(config).__name__)
    hint = "these tensors come without a model; use transformers or vLLM, or the operations"
    checks.require(config.extend == "none", "config.extend", "none", config.extend, hint)
    if sm_scale is not None:
        checks.check_scale(sm_scale)
    checks.check_softcap(softcap)


def check_whole(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ArgumentError where these do not fit each other.

    Args:
        q: `[batch, query_len, num_q_heads, head_dim]`.
        k, v: `[batch, kv_len, num_kv_heads, head_dim]`, query_len <= kv_len.
    """
    checks.check_floats("q", q, _Q_DIMS)
    for argument, x in (("k", k), ("v", v)):
        checks.check_floats(argument, x, _KV_DIMS)
        checks.check_same(argument, x, q)
    if v.shape != k.shape:
        raise ArgumentError("v", f"shape {list(k.shape)} as k", str(list(v.shape)))
    if k.shape[0] != q.shape[0]:
        raise ArgumentError("k", f"batch {q.shape[0]} as q", str(k.shape[0]))
    checks.check_heads(q, k.shape[2], k.shape[3], "k")
    if k.shape[1] < q.shape[1]:
        expected = f"a kv_len of {q.shape[1]} or more, as q has rows"
        hint = "pass the keys of the whole sequence"
        raise ArgumentError("k", expected, str(k.shape[1]), hint)
