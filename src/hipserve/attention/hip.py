"""`hip_attention`: HiP attention of whole, contiguous sequences."""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from hipserve.attention.crossover import rule_of
from hipserve.attention.dense import attend_chosen, dense_head
from hipserve.attention.inference import without_gradient
from hipserve.attention.layer import attend
from hipserve.config import DEFAULT, HiPConfig
from hipserve.errors import ArgumentError
from hipserve.ops import checks, compute_bounds
from hipserve.plan import BatchLayout, PruningRule
from hipserve.platform import resolve_backend
from hipserve.types import PagedKV

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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Hierarchically pruned attention (arXiv 2406.09827), in the layout of `flash_attn_func`.

    A bound selector has to make the bounds of `k` in every call. For a single row that costs more
    than it spares, so that such a row reads all keys unless `config.dense_below` says from where to
    prune. Where keys stay (`PagedKV`, `HiPCache`), their bounds stay too.

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
        return_lse: also return the log-sum-exp.

    Returns:
        out like q; with `return_lse` also lse `[batch, query_len, num_q_heads]`, float32
        (float64 for float64).

    Raises:
        ArgumentError: an argument does not fit; the message names it.
        BackendError: the backend asked for cannot run.
    """
    config = DEFAULT if config is None else config
    _check(q, k, v, config, causal, sm_scale, softcap)
    reads_all = config.dense_below is None and config.uses_bounds and q.shape[1] == 1
    rule = rule_of(config, q, k.shape[2])
    if not torch.compiler.is_compiling():
        resolve_backend(backend, q.device, q.dtype, q.shape[-1])
    options: dict[str, Any] = {"sm_scale": sm_scale, "softcap": softcap, "backend": backend}
    out, lse = _attend_whole(q, k, v, config, None if reads_all else rule, return_lse, options)
    if backend != "reference":  # eager torch has gradients
        out = without_gradient(out, q, k, v)
    return (out, lse) if return_lse else out


def _attend_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: HiPConfig,
    rule: PruningRule | None,
    return_lse: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; the latter only if asked for where torch's dense kernels compute.

    Without a rule every row reads everything.
    """
    batch, query_len, num_q_heads, head_dim = q.shape
    if q.numel() == 0:
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        return torch.empty_like(q), lse
    head = q[:, :0] if return_lse else dense_head(q, k, v, rule, **options)
    rows = head.shape[1]
    if rows == query_len:
        return head, head
    layout = whole_sequences(batch, query_len, k.shape[1], q.device)
    if rows:
        layout = layout.behind(rows, config.query_block_size)
    options = {**options, "config": config}
    packed = q.reshape(batch * query_len, num_q_heads, head_dim)
    if rule is None or not layout.may_prune(rule):
        out, lse = attend_chosen(packed, PagedKV(k, v), layout, None, **options)
    else:
        bounds = None
        if config.uses_bounds:
            size, backend = config.bound_block_size, options["backend"]
            bounds = compute_bounds(k, bound_block_size=size, backend=backend)
        out, lse = attend(packed, PagedKV(k, v, bounds), layout, rule=rule, check=False, **options)
    out = out.view(batch, query_len, num_q_heads, head_dim)
    if rows:
        out[:, :rows] = head
    return out, lse.view(batch, query_len, num_q_heads)


def whole_sequences(batch: int, query_len: int, kv_len: int, device: torch.device) -> BatchLayout:
    """The layout of a batch of equally long sequences, each of them one page.

    It is made from these numbers: nothing is read back from the device, and torch.compile can trace
    it.
    """
    pages = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    return BatchLayout.of(pages, [kv_len] * batch, [query_len] * batch)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: HiPConfig,
    causal: bool,
    sm_scale: float | None,
    softcap: float,
) -> None:
    checks.require(causal is True, "causal", "True", causal, "use dense attention otherwise")
    kind = isinstance(cast("object", config), HiPConfig)
    checks.require(kind, "config", "a HiPConfig", type(config).__name__, "build one")
    checks.check_floats("q", q, _Q_DIMS)
    for argument, x in (("k", k), ("v", v)):
        checks.check_floats(argument, x, _KV_DIMS)
        checks.check_same(argument, x, q)
    if v.shape != k.shape:
        raise ArgumentError("v", f"shape {list(k.shape)} as k", str(list(v.shape)), "match them")
    if k.shape[0] != q.shape[0]:
        raise ArgumentError("k", f"batch {q.shape[0]} as q", str(k.shape[0]), "match them")
    checks.check_heads(q, k.shape[2], k.shape[3], "k")
    if k.shape[1] < q.shape[1]:
        expected = f"at least the {q.shape[1]} keys of q's own rows"
        hint = "pass the keys of the whole sequence"
        raise ArgumentError("k", expected, str(k.shape[1]), hint)
    if sm_scale is not None:
        checks.check_scale(sm_scale)
    checks.check_softcap(softcap)
