"""The attention function that transformers calls for every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hipserve.attention import (
    AttentionLayer,
    HeldKeys,
    StepSelections,
    WholeKeys,
    absorb_sinks,
)
from hipserve.attention.crossover import rule_of, rule_of_whole
from hipserve.attention.hip import check_whole
from hipserve.attention.inference import without_gradient
from hipserve.attention.padding import attend_columns, without_padding
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.integrations.transformers.cache import HiPCacheLayer, PagedHandle
from hipserve.integrations.transformers.keys import CapturedKeys, PageKeys
from hipserve.integrations.transformers.masks import MaskDescription
from hipserve.integrations.transformers.positions import rope_of
from hipserve.integrations.transformers.settings import config_of
from hipserve.ops import build_index

logger: Any = logging.get_logger(__name__)
NO_WEIGHTS = (
    "`hip` attention does not support `output_attentions=True`: no weights are returned. "
    "Set your attention to `eager` if you want them."
)


@torch.compiler.disable  # one call outside of a compiled graph, whatever is in config.hip
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
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers calls it.

    query `[batch, num_q_heads, query_len, head_dim]`, key and value `[batch, num_kv_heads, kv_len,
    head_dim]` or handles of a `HiPCache`; returns `[batch, query_len, num_q_heads, head_dim]`.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(module, dropout, attention_mask, causal)
    _refuse_other_scores(module, key, value, position_bias)
    if output_attentions:  # as sdpa does
        logger.warning_once(NO_WEIGHTS)
    sink_logits = None if s_aux is None else s_aux.detach().flatten()
    scores = {"sm_scale": scaling, "softcap": softcap or 0.0, "sink_logits": sink_logits}
    layer = _attention_layer(module, query, key, attention_mask, scores, sliding_window)
    if isinstance(key, PagedHandle):
        out = _attend_pages(query, key.layer, attention_mask, layer)
    else:
        out = _attend_tensors(query, key, value, attention_mask, layer)
    learned = () if s_aux is None else (s_aux,)
    return without_gradient(out, query, key, value, *learned), None


def _refuse_other_scores(
    module: nn.Module, key: Tensor, value: Tensor, position_bias: Tensor | None
) -> None:
    name, hint = type(module).__name__, 'use attn_implementation="sdpa" for this model'
    if position_bias is not None:
        raise ArgumentError("position_bias", f"none in {name}", "some", hint)
    if key.shape[-1] != value.shape[-1]:
        expected = f"keys and values of one head_dim in {name} (MLA has two)"
        got = f"{key.shape[-1]} and {value.shape[-1]}"
        raise ArgumentError("value", expected, got, hint)


def _attention_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: MaskDescription | None,
    scores: dict[str, Any],
    sliding_window: int | None,
) -> AttentionLayer:
    """How this layer of the model attends in this call."""
    number = getattr(module, "layer_idx", None)
    config: HiPConfig = config_of(module.config).of_layer(number or 0)
    window = sliding_window or (mask.sliding_window if mask else 0)
    dense = number in config.dense_layers
    if window or (dense and not config.streams):
        return AttentionLayer(sliding_window=window, **scores)
    paged = key.layer if isinstance(key, PagedHandle) else None
    if paged is not None and paged.captured is not None:
        return _captured_layer(paged.captured, config, scores)
    q = query.transpose(1, 2)
    rule = (rule_of if paged else rule_of_whole)(config, q, key.shape[1])
    if rule is not None and dense:
        rule = rule.dense_within()
    scores["rope"] = rope_of(module, config, q.shape[-1], q.device)
    if paged is None:
        return AttentionLayer(config, rule, **scores)
    kept = {"selections": paged.reuse, "account": paged.account, "meter": paged.meter}
    return AttentionLayer(config, rule, **kept, **scores)


def _captured_layer(
    keys: CapturedKeys, config: HiPConfig, scores: dict[str, Any]
) -> AttentionLayer:
    """How a layer attends in a step that a graph repeats."""
    rule = keys.plan.rule if keys.prunes else None
    selections = StepSelections(keys.requests, keys.plan)
    return AttentionLayer(config, rule, selections=selections, account=keys.counter, **scores)


def _refuse(
    module: nn.Module,
    dropout: float,
    mask: object,
    causal: bool,
) -> None:
    if not causal:
        hint = 'use attn_implementation="sdpa" for encoders and cross attention'
        raise ArgumentError("is_causal", "True: HiP prunes causal attention", "False", hint)
    if dropout and module.training:
        raise ArgumentError("dropout", "0", str(dropout), "HiP attention is for inference")
    if not (mask is None or isinstance(mask, MaskDescription)):
        hint = "pass a 2-D padding mask, or none"
        raise ArgumentError("attention_mask", "a 2-D mask or None", type(mask).__name__, hint)


def _attend_pages(
    query: Tensor, cache: HiPCacheLayer, mask: MaskDescription | None, layer: AttentionLayer
) -> Tensor:
    rows = query.transpose(1, 2)
    if layer.rule is not None:
        cache.check_index(layer.config)
    if cache.captured is not None:
        return layer.forward_batch(rows, cache.captured)[0]
    valid = _pages_mask(cache, query, mask, layer)
    keys = PageKeys(cache, rows.shape[1], valid)
    if valid is None:
        return layer.forward_batch(rows, keys)[0]
    padded = rows.new_zeros(rows.shape)
    padded[valid] = layer.forward(rows[valid], keys)[0]
    return padded


def _pages_mask(
    cache: HiPCacheLayer, query: Tensor, mask: MaskDescription | None, layer: AttentionLayer
) -> Tensor | None:
    """`[batch, query_len]`: which of the new tokens count, or None where all do.

    Raises:
        ArgumentError: the mask hides other keys of the pages than it did when they were written, or
            tokens inside of a window: pages hold no padding, and the window would reach too far.
    """
    if mask is None:
        return None
    query_len, device = query.shape[2], query.device
    valid = mask.valid_rows(cache.seen, query_len, device)
    if cache.unfinished:
        mask.check_held(cache.seen - query_len, cache.padded)
    if layer.sliding_window and mask.has_holes(cache.seen, device):
        hint = "pass transformers' own cache, or no padding between tokens"
        raise ArgumentError("attention_mask", "padding at the ends", "some in between", hint)
    return valid


def _attend_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskDescription | None,
    layer: AttentionLayer,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if mask is not None:  # a static cache hands out more rows than are filled
        filled = mask.q_offset + mask.q_length - mask.kv_offset
        k, v = k[:, :filled], v[:, :filled]
        if k.shape[1] < filled:
            got = f"{k.shape[1]}: an earlier step failed between layers"
            hint = "make a new cache, and read the text again"
            raise ArgumentError("past_key_values", f"{filled} keys in every layer", got, hint)
    valid = mask.valid_rows(k.shape[1], k.shape[1], q.device) if mask else None
    if valid is None:
        check_whole(q, k, v)
        return layer.forward_batch(q, WholeKeys(k, v, q.shape[1], layer.index_form))[0]
    if layer.sliding_window and mask and mask.has_holes(k.shape[1], q.device):
        return _attend_columns(q, k, v, valid, layer)
    return _attend_unequal(q, k, v, valid, layer)


def _attend_columns(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: AttentionLayer
) -> Tensor:
    """A window with padding inside, which packed rows cannot express."""
    out, lse = attend_columns(
        q, k, v, valid, layer.sliding_window, sm_scale=layer.sm_scale, softcap=layer.softcap
    )
    if layer.sink_logits is None:
        return out
    return absorb_sinks(out, lse, layer.sink_logits, check=False)[0]


def _attend_unequal(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: AttentionLayer
) -> Tensor:
    """Sequences without their padding."""
    pool, layout, rows = without_padding(k, v, valid, q.shape[1])
    index = build_index(pool.k_cache, **layer.index_form._asdict())
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    out[rows] = layer.forward(q[rows], HeldKeys(pool, index, layout))[0]
    return out
