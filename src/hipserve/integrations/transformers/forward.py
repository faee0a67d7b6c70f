"""The attention function that transformers calls for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hipserve.attention import SelectionReuse, absorb_sinks, attend, hip_attention
from hipserve.attention.columns import attend_columns
from hipserve.attention.crossover import rule_of
from hipserve.attention.dense import attend_chosen, dense_head
from hipserve.attention.inference import without_gradient
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.integrations.transformers.cache import HiPCacheLayer, PagedHandle
from hipserve.integrations.transformers.masks import MaskDescription
from hipserve.integrations.transformers.settings import config_of
from hipserve.ops import compute_bounds
from hipserve.plan import BatchLayout, PruningRule
from hipserve.types import PagedKV

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
    kv_heads = key.shape[1]
    call = _layer_call(
        module, query, kv_heads, attention_mask, scaling, sliding_window, softcap, s_aux
    )
    if isinstance(key, PagedHandle):
        out = _attend_pages(query, key, attention_mask, call)
    else:
        out = _attend_tensors(query, key, value, attention_mask, call)
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


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How one layer attends.

    Attributes:
        config, rule: what is pruned, and in which query blocks; both None where nothing is.
        sliding_window: the model's own window of this layer; 0 for none.
        scores: `sm_scale` and `softcap`.
        sink_logits: `[num_q_heads]` that the model has learned, or None.
    """

    config: HiPConfig | None
    rule: PruningRule | None
    sliding_window: int
    scores: dict[str, Any]
    sink_logits: Tensor | None

    def finish(self, part: tuple[Tensor, Tensor]) -> Tensor:
        """The output, of output and log-sum-exp without the sinks."""
        if self.sink_logits is None:
            return part[0]
        return absorb_sinks(*part, self.sink_logits, check=False)[0]


def _layer_call(
    module: nn.Module,
    query: Tensor,
    kv_heads: int,
    mask: MaskDescription | None,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> LayerCall:
    config: HiPConfig | None = config_of(module.config)
    window = sliding_window or (mask.sliding_window if mask else 0)
    if window or getattr(module, "layer_idx", None) in config.dense_layers:
        config = None
    rule = rule_of(config, query.transpose(1, 2), kv_heads) if config else None
    scores = {"sm_scale": scaling, "softcap": softcap or 0.0}
    sink_logits = None if s_aux is None else s_aux.detach().flatten()
    return LayerCall(config, rule, window, scores, sink_logits)


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
    query: Tensor, key: PagedHandle, mask: MaskDescription | None, call: LayerCall
) -> Tensor:
    layer, rows, rule = key.layer, query.transpose(1, 2), call.rule
    if call.config is not None:
        layer.settle(call.config)
    batch, query_len = rows.shape[:2]
    valid = _pages_mask(layer, query, mask, call)
    fresh = layer.write(valid)
    head = rows[:, :0]
    if fresh is not None and valid is None and query_len == layer.seen and not call.sliding_window:
        head = dense_head(rows, *fresh, rule, sink_logits=call.sink_logits, **call.scores)
    first = head.shape[1]
    if first and first == query_len:
        if rule is not None:
            layer.reuse.count_dense(batch, first)
        return head
    lens = [query_len] * batch if valid is None else valid.sum(1).tolist()
    layout = layer.pages.layout(lens)
    if rule is not None:
        if layout.may_prune(rule):  # else all rows are counted together
            layer.reuse.count_dense(batch, first)
        if first:
            layout = layout.behind(first, rule.query_block_size)
    q = rows.flatten(0, 1) if valid is None else rows[valid]
    out = _attend(q, layer.pages.pages, layout, call, layer.reuse)
    if valid is None:
        out = out.view(batch, query_len, *out.shape[1:])
        if first:
            out[:, :first] = head
        return out
    padded = rows.new_zeros(rows.shape)
    padded[valid] = out
    return padded


def _pages_mask(
    layer: HiPCacheLayer, query: Tensor, mask: MaskDescription | None, call: LayerCall
) -> Tensor | None:
    """`[batch, query_len]`: which of the new tokens count, or None where all do.

    Raises:
        ArgumentError: the mask hides other keys of the pages than it did when they were written, or
            tokens inside of a window: pages hold no padding, so that it would reach too far.
    """
    if mask is None:
        return None
    query_len, device = query.shape[2], query.device
    valid = mask.valid_rows(layer.seen, query_len, device)
    if layer.unfinished:
        mask.check_held(layer.seen - query_len, layer.padded)
    if call.sliding_window and mask.has_holes(layer.seen, device):
        hint = "pass transformers' own cache, or no padding between tokens"
        raise ArgumentError("attention_mask", "padding at the ends", "some in between", hint)
    return valid


def _attend(
    q: Tensor,
    kv: PagedKV,
    layout: BatchLayout,
    call: LayerCall,
    reuse: SelectionReuse | None = None,
) -> Tensor:
    """`[num_tokens, num_q_heads, head_dim]` of packed rows over pages, pruned or not."""
    options, window = call.scores, call.sliding_window
    if call.config is not None:
        options: dict[str, Any] = {**options, "check": False}
        options |= {"config": call.config, "rule": call.rule, "reuse": reuse}
        return call.finish(attend(q, kv, layout, **options))
    return call.finish(attend_chosen(q, kv, layout, None, sliding_window=window, **options))


def _attend_tensors(
    query: Tensor, key: Tensor, value: Tensor, mask: MaskDescription | None, call: LayerCall
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
    if call.sliding_window and valid is not None and mask and mask.has_holes(k.shape[1], q.device):
        return call.finish(attend_columns(q, k, v, valid, call.sliding_window, **call.scores))
    if valid is None and call.config is not None:
        options: dict[str, Any] = {"config": call.config, **call.scores}
        if call.sink_logits is None:
            return hip_attention(q, k, v, **options)
        return call.finish(hip_attention(q, k, v, return_lse=True, **options))
    return _attend_unequal(q, k, v, valid, call)


def _attend_unequal(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, call: LayerCall
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
    bounds = None
    if call.config is not None and call.config.uses_bounds:
        bounds = compute_bounds(k, bound_block_size=call.config.bound_block_size)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    out[rows] = _attend(q[rows], PagedKV(k, v, bounds), layout, call)
    return out
