"""`attn_implementation="hip"` for unmodified transformers models, and the cache that goes with it.

Importing this module registers the implementation. `HiPCache`, passed as `past_key_values`, keeps
keys and values in pages, so that a decode step neither copies nor reads the whole cache; without
it HiP attention runs over the tensors that transformers' own caches hand out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.masking_utils import causal_mask_function

from hipserve.attention import SelectionReuse, attend, hip_attention
from hipserve.attention.dense import dense_head
from hipserve.attention.inference import without_gradient
from hipserve.cache import PagedLayer
from hipserve.config import DEFAULT, HiPConfig
from hipserve.errors import ArgumentError
from hipserve.ops import block_sparse_attention, compute_bounds
from hipserve.types import BatchLayout, PagedKV, bound_levels

NAME = "hip"
PAGE_SIZE = 256
_default = DEFAULT
_parsed: tuple[dict[str, Any], HiPConfig] = {}, DEFAULT


def register(config: HiPConfig | None = None) -> None:
    """Registers `attn_implementation="hip"`; `config` is for models that carry none.

    A model's own settings, `model.config.hip = {...}` with the keys of `HiPConfig`, come first;
    `save_pretrained` writes them and `from_pretrained` reads them back.
    """
    global _default
    if not (config is None or isinstance(cast("object", config), HiPConfig)):
        raise ArgumentError("config", "a HiPConfig", type(config).__name__, "build one")
    _default = config or _default
    AttentionInterface.register(NAME, hip_forward)
    AttentionMaskInterface.register(NAME, describe_mask)


def config_of(model_config: Any) -> HiPConfig:
    """The HiPConfig of a model: its own, or the registered one."""
    own = getattr(model_config, NAME, None)
    return _default if own is None else _parse(own)


def _parse(settings: dict[str, Any]) -> HiPConfig:
    """Every layer asks at every step: settings equal to the last ones are not validated again."""
    global _parsed
    if not isinstance(cast("object", settings), dict):
        hint = 'write model.config.hip = {"budget": 2048}, or {"preset": "fast"}'
        raise ArgumentError("config.hip", "a dict of HiPConfig's fields", repr(settings), hint)
    if settings != _parsed[0]:
        _parsed = copy.deepcopy(dict(settings)), HiPConfig.from_dict(dict(settings))
    return _parsed[1]


# Masks: a record instead of a matrix, O(1) for any length.


@dataclass(eq=False)
class MaskDescription:
    """Who may read whom, for a batch: causal, a window, and which keys are padding."""

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    sliding_window: int
    key_valid: Tensor | None
    _valid_rows: dict[Any, Tensor | None] = field(default_factory=dict, repr=False)

    ndim: ClassVar[int] = 4  # transformers leaves a mask of four axes alone

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch_size, 1, self.q_length, self.kv_length)

    def contiguous(self) -> MaskDescription:
        return self

    def to(self, *_: Any, **__: Any) -> MaskDescription:
        return self

    def valid_rows(self, kv_length: int, rows: int, device: torch.device) -> Tensor | None:
        """`[batch, rows]` of the last of `kv_length` keys, or None where all of them count.

        Found once for all layers of a device: each time waits for it.

        Raises:
            ArgumentError: the mask does not reach as far as the keys.
        """
        if self.key_valid is None:
            return None
        asked = (kv_length, rows, device)
        if asked not in self._valid_rows:
            end = self.kv_offset + kv_length
            if self.key_valid.shape[1] < end:
                hint = "pass a column for every key, those in the cache included"
                got = f"{self.key_valid.shape[1]} columns"
                raise ArgumentError("attention_mask", f"{end} columns", got, hint)
            valid = self.key_valid[:, end - rows : end].bool().to(device)
            self._valid_rows[asked] = None if bool(valid.all()) else valid
        return self._valid_rows[asked]


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> MaskDescription:
    """Called by transformers in place of building a mask.

    Raises:
        ArgumentError: for a mask that is neither causal nor a sliding window.
    """
    if isinstance(attention_mask, MaskDescription):
        return attention_mask
    windowed = local_size is not None and not use_vmap
    strange = [name for name in _parts(mask_function) if not name.startswith(CAUSAL_PARTS)]
    if strange or (mask_function is not causal_mask_function and not windowed):
        raise ArgumentError(
            "attention_mask",
            "a causal or sliding-window mask, padded or not",
            strange[0] if strange else getattr(mask_function, "__qualname__", "another mask"),
            'use attn_implementation="sdpa" for packed, bidirectional or custom masks',
        )
    # Offsets may be live tensors that a cache changes later: int() takes their value now.
    return MaskDescription(
        batch_size,
        q_length,
        int(kv_length),
        int(q_offset),
        int(kv_offset),
        local_size or 0,
        attention_mask,
    )


CAUSAL_PARTS = ("causal_mask_function", "and_masks", "sliding_window_overlay")
"""What a causal mask or a sliding window is made of; chunks and packed sequences have more."""


def _parts(mask_function: Any) -> list[str]:
    """Names of a mask function of transformers and of all that it is made of."""
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__)
    held = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    inner = [part for x in held for part in (x if isinstance(x, tuple | list) else [x])]
    return [name, *(n for part in inner if callable(part) for n in _parts(part))]


# The attention function.


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


# The cache.


class PagedHandle(torch.Tensor):
    """Keys or values of a `HiPCache` layer on their way to `hip_forward`: a shape, no storage."""

    layer: HiPCacheLayer

    @staticmethod
    def __new__(cls: Any, layer: HiPCacheLayer, fresh: Tensor) -> PagedHandle:
        batch, heads, _, dim = fresh.shape
        shape = (batch, heads, layer.seen, dim)
        handle = torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, shape, dtype=fresh.dtype, device=fresh.device
        )
        handle.layer = layer
        return handle

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PagedHandle({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ArgumentError(
            "past_key_values",
            'a cache that fits the attention: HiPCache goes with attn_implementation="hip"',
            f"a HiPCache whose keys reached {func}",
            'call model.set_attn_implementation("hip") or pass another cache',
        )


class HiPCacheLayer(CacheLayerMixin):
    """One layer of a `HiPCache`: pages, and the selection that decode steps share."""

    is_sliding = False
    is_croppable = True

    def __init__(self, page_size: int, bound_block_size: int | None) -> None:
        super().__init__()
        self.pages = PagedLayer(page_size, bound_block_size)
        self.reuse = SelectionReuse()
        self.seen = 0
        self._config: HiPConfig | None = None
        self._fresh: tuple[Tensor, Tensor] | None = None
        self._padded: list[tuple[int, Tensor]] = []  # where columns with padding begin, who counts

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the new keys and values; the attention function, which knows the mask, writes."""
        self.lazy_initialization(key_states, value_states)
        if self._fresh is not None:
            got = "one whose last step failed half-way"
            hint = "reset it or make a new one, and read the text again"
            raise ArgumentError("past_key_values", "a HiPCache whose steps all ended", got, hint)
        self._fresh = (key_states, value_states)
        self.seen += key_states.shape[2]
        return PagedHandle(self, key_states), PagedHandle(self, value_states)

    def write(self, valid: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Appends what `update` took, without the tokens that `valid` leaves out, and returns it.

        Keys and values `[batch, new, num_kv_heads, head_dim]`; None if they were written before.
        """
        if self._fresh is None:
            return None
        k, v = (x.transpose(1, 2) for x in self._fresh)
        self._fresh = None
        self.pages.append(k, v, valid)
        if valid is not None:
            self._padded.append((self.seen - k.shape[1], valid))
        return k, v

    def settle(self, config: HiPConfig) -> None:
        """A selection serves the configuration that it was made with, and no other.

        Raises:
            ArgumentError: the pages keep other bounds than this configuration reads.
        """
        if config == self._config:
            return
        kept, wanted = self.pages.bound_block_size, config.bound_block_size
        if config.uses_bounds and kept != wanted:
            got = "one without bounds" if kept is None else f"one of runs of {kept} keys"
            hint = "make a new HiPCache(model.config) after config.hip was changed"
            expected = f"a HiPCache with bounds of runs of {wanted} keys"
            raise ArgumentError("past_key_values", expected, got, hint)
        self.reuse.clear()
        self._config = config

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: Any) -> None:
        """Removes -n tokens; a positive number is the length to keep (older transformers).

        Raises:
            ArgumentError: some of these tokens are padding, and others are not.
        """
        count = int(tokens_to_remove)
        removed = min(-count if count <= 0 else max(self.seen - count, 0), self.seen)
        left = self.seen - removed
        tails = [valid[:, max(left - start, 0) :] for start, valid in self._padded]
        if left and not all(bool(tail.all()) for tail in tails):
            hint = "crop less, or read the batch again"
            expected = "columns in which no sequence is padded"
            raise ArgumentError("tokens_to_remove", expected, str(tokens_to_remove), hint)
        self._padded = [(start, valid) for start, valid in self._padded if start < left]
        self.seen = left
        self.pages.truncate(removed)
        self.reuse.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(torch.arange(len(self.pages.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(torch.arange(len(self.pages.lengths))[indices.cpu()])

    def _take(self, order: Tensor) -> None:
        if self.pages.lengths:
            self.pages.reorder(order)
            self.reuse.reorder(order)

    def reset(self) -> None:
        self.seen, self._fresh = 0, None
        self._padded.clear()
        self.pages.clear()
        self.reuse.clear()

    def offload(self) -> None:
        """Pages stay where they are."""

    def prefetch(self) -> None:
        """Pages stay where they are."""


class HiPCache(Cache):
    """Keys and values in pages, with the bounds that selection reads.

    >>> model.generate(ids, past_key_values=HiPCache(model.config))  # doctest: +SKIP

    Args:
        config: the model's configuration; its sliding-window layers keep transformers' own cache.
        page_size: keys in a page; a multiple of 16 times `bound_block_size` serves bounds best. 256
            if None and bounds fit, else 16 times `bound_block_size`.

    Raises:
        ArgumentError: runs of bounds would straddle such pages.
    """

    def __init__(self, config: Any, page_size: int | None = None) -> None:
        if not hasattr(config, "get_text_config"):
            raise ArgumentError("config", "model.config", type(config).__name__, "pass that")
        hip = config_of(config.get_text_config(decoder=True))
        bound = hip.bound_block_size if hip.uses_bounds else None
        if page_size is None:
            fits = bound is None or PAGE_SIZE % bound_levels(PAGE_SIZE, bound)[-1] == 0
            page_size = PAGE_SIZE if fits else 16 * hip.bound_block_size
        own = DynamicCache(config=config).layers
        super().__init__(
            layers=[
                HiPCacheLayer(page_size, bound) if type(layer) is DynamicLayer else layer
                for layer in own
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes held by the pages of all layers."""
        return sum(layer.pages.nbytes for layer in self._paged())

    def count_keys(self) -> tuple[float, float]:
        """Keys read by all rows of the pruned layers so far, and those a dense layer would read."""
        reuses = [layer.reuse for layer in self._paged()]
        read = sum(reuse.keys_read for reuse in reuses)
        return read, sum(reuse.keys_visible for reuse in reuses)

    def _paged(self) -> list[HiPCacheLayer]:
        return [layer for layer in self.layers if isinstance(layer, HiPCacheLayer)]


register()
