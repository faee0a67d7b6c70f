"""The attention function that transformers calls for every layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from hipserve.attention import attend, hip_attention
from hipserve.attention.dense import dense_head
from hipserve.attention.inference import without_gradient
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.integrations.transformers.cache import PagedHandle
from hipserve.integrations.transformers.masks import MaskDescription
from hipserve.integrations.transformers.settings import config_of
from hipserve.ops import block_sparse_attention, compute_bounds
from hipserve.types import BatchLayout, PagedKV


def hip_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskDescription | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers calls it.

    query `[batch, num_q_heads, query_len, head_dim]`, key and value `[batch, num_kv_heads, kv_len,
    head_dim]` or handles of a `HiPCache`; returns `[batch, query_len, num_q_heads, head_dim]`.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(module, dropout, s_aux, attention_mask, causal)
    config: HiPConfig | None = config_of(module.config).on(query.device.type)
    window = sliding_window or (attention_mask.sliding_window if attention_mask else 0)
    if getattr(module, "layer_idx", None) in config.dense_layers or window:
        config = None
    options = {"sm_scale": scaling, "softcap": softcap or 0.0}
    if isinstance(key, PagedHandle):
        out = _attend_pages(query, key, attention_mask, config, window, options)
    else:
        out = _attend_tensors(query, key, value, attention_mask, config, window, options)
    return without_gradient(out, query, key, value), None


def _refuse(
    module: nn.Module,
    dropout: float,
    s_aux: Tensor | None,
    mask: object,
    causal: bool,
) -> None:
    if not causal:
        hint = 'use attn_implementation="sdpa" for encoders and cross attention'
        raise ArgumentError("is_causal", "True: HiP prunes causal attention", "False", hint)
    if dropout and module.training:
        raise ArgumentError("dropout", "0", str(dropout), "HiP attention is for inference")
    if s_aux is not None:
        hint = 'use attn_implementation="eager" for models with learned sinks'
        raise ArgumentError("s_aux", "no learned sink logits", "some", hint)
    if not (mask is None or isinstance(mask, MaskDescription)):
        hint = "pass a 2-D padding mask, or none"
        raise ArgumentError("attention_mask", "a 2-D mask or None", type(mask).__name__, hint)


def _attend_pages(
    query: Tensor,
    key: PagedHandle,
    mask: MaskDescription | None,
    config: HiPConfig | None,
    sliding_window: int,
    options: dict[str, Any],
) -> Tensor:
    layer, rows = key.layer, query.transpose(1, 2)
    if config is not None:
        layer.settle(config)
    batch, query_len = rows.shape[:2]
    valid = mask.valid_rows(layer.seen, query_len, query.device) if mask else None
    fresh = layer.write(valid)
    head = rows[:, :0]
    if fresh is not None and valid is None and query_len == layer.seen and not sliding_window:
        head = dense_head(rows, *fresh, config, **options)
    first = head.shape[1]
    if first and first == query_len:
        if config is not None:
            layer.reuse.count_dense(batch, first)
        return head
    lens = [query_len] * batch if valid is None else valid.sum(1).tolist()
    layout = layer.pages.layout(lens)
    q = rows.flatten(0, 1) if valid is None else rows[valid]
    if config is None:
        options = {**options, "sliding_window": sliding_window, "check": False}
        out = block_sparse_attention(q, layer.pages.pages, layout, **options)[0]
    else:
        if layout.may_prune(config):  # else all rows are counted together
            layer.reuse.count_dense(batch, first)
        if first:
            layout = layout.behind(first, config.query_block_size)
        options = {**options, "config": config, "reuse": layer.reuse, "check": False}
        out = attend(q, layer.pages.pages, layout, **options)[0]
    if valid is None:
        out = out.view(batch, query_len, *out.shape[1:])
        if first:
            out[:, :first] = head
        return out
    padded = rows.new_zeros(rows.shape)
    padded[valid] = out
    return padded


def _attend_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskDescription | None,
    config: HiPConfig | None,
    sliding_window: int,
    options: dict[str, Any],
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if mask is not None:  # a static cache hands out more rows than are filled
        filled = mask.q_offset + mask.q_length - mask.kv_offset
        k, v = k[:, :filled], v[:, :filled]
    valid = mask.valid_rows(k.shape[1], k.shape[1], q.device) if mask else None
    if valid is None and config is not None:
        return cast("Tensor", hip_attention(q, k, v, config=config, **options))
    return _attend_unequal(q, k, v, valid, config, sliding_window, options)


def _attend_unequal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    config: HiPConfig | None,
    sliding_window: int,
    options: dict[str, Any],
) -> Tensor:
    """Sequences without their padding: each is one page of the keys that count, in order."""
    batch, kv_len = k.shape[:2]
    device = q.device
    if valid is None:
        valid = torch.ones(batch, kv_len, dtype=torch.bool, device=device)
    else:
        order = valid.logical_not().sort(dim=1, stable=True).indices[..., None, None].expand_as(k)
        k, v = k.gather(1, order), v.gather(1, order)
    rows = valid[:, kv_len - q.shape[1] :]
    layout = BatchLayout(
        torch.arange(batch, dtype=torch.int32, device=device)[:, None],
        valid.sum(1).int(),
        torch.cat([rows.new_zeros(1, dtype=torch.int32), rows.sum(1).cumsum(0).int()]),
    )
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    if config is None:
        options = {**options, "sliding_window": sliding_window}
        part, _ = block_sparse_attention(q[rows], PagedKV(k, v), layout, check=False, **options)
    else:
        size = config.bound_block_size
        bounds = compute_bounds(k, bound_block_size=size) if config.uses_bounds else None
        kv = PagedKV(k, v, bounds)
        part, _ = attend(q[rows], kv, layout, config=config, check=False, **options)
    out[rows] = part
    return out
