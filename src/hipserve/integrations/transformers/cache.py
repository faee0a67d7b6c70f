"""`HiPCache`: keys and values of a transformers model in pages."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hipserve.attention import Account, Meter, SelectionReuse, UnreadMass
from hipserve.cache import MakeStore, OffloadedLayers, PagedLayer, ResidentPages
from hipserve.config import HiPConfig, IndexForm
from hipserve.errors import ArgumentError
from hipserve.integrations.transformers.keys import CapturedKeys
from hipserve.integrations.transformers.settings import config_of
from hipserve.offload import Offload
from hipserve.plan import bound_levels

PAGE_SIZE = 256


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
            'call model.set_attn_implementation("hip"); where it is set, this model computes with '
            "its keys itself (MLA, ALiBi): pass no HiPCache, and use another attention",
        )


class HiPCacheLayer(CacheLayerMixin):
    """One layer of a `HiPCache`: pages, and the selection that decode steps share."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        page_size: int,
        form: IndexForm,
        make_store: MakeStore = ResidentPages,
        meter: Meter | None = None,
    ) -> None:
        super().__init__()
        self.pages = PagedLayer(page_size, *form, make_store)
        self.reuse, self.account = SelectionReuse(), Account()
        self.meter = meter
        self.captured: CapturedKeys | None = None  # while a step is run for a graph
        self.seen = 0
        self.num_orders = 0  # how often sequences changed places
        self._fresh: tuple[Tensor, Tensor] | None = None
        self.padded: list[
            tuple[int, Tensor]
        ] = []  # where columns with padding begin, and which count

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        """Pages are made when something is appended.

        key_states, value_states: `[batch, num_kv_heads, new, head_dim]`.
        """
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the new keys and values; the attention function, which knows the mask, writes.

        key_states, value_states: `[batch, num_kv_heads, new, head_dim]`.

        Returns:
            handles of shape `[batch, num_kv_heads, tokens held and new, head_dim]`.
        """
        self.lazy_initialization(key_states, value_states)
        if key_states.shape != value_states.shape:
            got = f"{[*key_states.shape]} and {[*value_states.shape]}"
            hint = 'use attn_implementation="sdpa" and its cache for models with MLA'
            raise ArgumentError("value_states", "the shape of the keys", got, hint)
        if self._fresh is not None:
            raise _unfinished()
        self._fresh = (key_states, value_states)
        if self.captured is None:  # else the host counts, as for replays
            self.seen += key_states.shape[2]
        return PagedHandle(self, key_states), PagedHandle(self, value_states)

    @property
    def unfinished(self) -> bool:
        """Keys were taken that the attention function has not written yet."""
        return self._fresh is not None

    def write(self, valid: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Appends what `update` took, without the tokens that `valid` leaves out, and returns it.

        Keys and values `[batch, new, num_kv_heads, head_dim]`; None if they were written before.
        """
        if self._fresh is None:
            return None
        k, v = (x.transpose(1, 2) for x in self._fresh)
        if self.captured is not None:
            self.captured.write(k, v)
        else:
            self.pages.append(k, v, valid)
        self._fresh = None  # not before: a step that failed here did not end
        if valid is not None:
            self.padded.append((self.seen - k.shape[1], valid))
        return k, v

    def go_by(self, captured: CapturedKeys | None) -> None:
        """From now on steps are run for a graph, or None for one of their own."""
        self.captured, self._fresh = captured, None

    def check_index(self, config: HiPConfig) -> None:
        """Raises ArgumentError where the pages keep another index than `config` reads."""
        kept, wanted = self.pages.form, config.index_form
        missing = wanted.run_size is not None and kept.run_size != wanted.run_size
        if missing or kept.code_bits != wanted.code_bits:
            hint = "make a new HiPCache(model.config) after config.hip was changed"
            expected = f"a HiPCache with {wanted}"
            raise ArgumentError("past_key_values", expected, f"one with {kept}", hint)

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
        tails = [valid[:, max(left - start, 0) :] for start, valid in self.padded]
        if left and not all(bool(tail.all()) for tail in tails):
            hint = "crop less, or read the batch again"
            expected = "columns in which no sequence is padded"
            raise ArgumentError("tokens_to_remove", expected, str(tokens_to_remove), hint)
        self.padded = [(start, v[:, : left - start]) for start, v in self.padded if start < left]
        self.seen = left
        self.pages.truncate(removed)
        self.reuse.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues what was sequence `beam_idx[i]`; beam_idx: `[batch]` int64."""
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(torch.arange(len(self.pages.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences; indices: `[n]` int64, or `[batch]` bool."""
        self._take(torch.arange(len(self.pages.lengths))[indices.cpu()])

    def _take(self, order: Tensor) -> None:
        self.num_orders += 1
        if self.pages.lengths:
            self.pages.reorder(order)
            self.reuse.reorder(order)
            self.padded = [(start, valid[order.to(valid.device)]) for start, valid in self.padded]

    def reset(self) -> None:
        self.seen, self._fresh = 0, None
        self.padded.clear()
        self.pages.clear()
        self.reuse.clear()

    def offload(self) -> None:
        """Pages stay where they are."""

    def prefetch(self) -> None:
        """Pages stay where they are."""


def _unfinished() -> ArgumentError:
    got = "one whose last step failed half-way"
    hint = "reset it or make a new one, and read the text again"
    return ArgumentError("past_key_values", "a HiPCache whose steps all ended", got, hint)


def _length(layer: Any) -> int | None:
    """Tokens that a layer holds; None where it has states instead of tokens."""
    counts = isinstance(layer, HiPCacheLayer | DynamicLayer)
    return int(layer.get_seq_length()) if counts else None


class HiPCache(Cache):
    """Keys and values in pages, with the index that a search reads.

    >>> model.generate(ids, past_key_values=HiPCache(model.config))  # doctest: +SKIP

    Args:
        config: the model's configuration; its sliding-window layers keep transformers' own cache.
        page_size: keys in a page; a multiple of 16 times `bound_block_size` serves the index
            best. 256 if None and runs fit, else 16 times `bound_block_size`.
        offload: where keys and values are kept apart from the model; by default beside it. The
            model's `config.hip` needs `code_bits` 4 or 8. Layers in `dense_layers` stay resident.

    Raises:
        ArgumentError: runs would straddle such pages, or the search or the meter reads what is
            offloaded.
        FitError: `offload` asks for more than there is.
    """

    def __init__(
        self, config: Any, page_size: int | None = None, *, offload: Offload | None = None
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise ArgumentError("config", "model.config", type(config).__name__)
        hip = config_of(config.get_text_config(decoder=True))
        run_size = hip.run_size
        if page_size is None:
            fits = run_size is None or PAGE_SIZE % bound_levels(PAGE_SIZE, run_size)[-1] == 0
            page_size = PAGE_SIZE if fits else 16 * hip.bound_block_size
        self._step: tuple[int | None, int] | None = None  # tokens held and new at the last update
        self.recorded: object = None  # the decode step that `capture_decode` keeps for it
        self._captured_read: Tensor | None = None  # keys that captured steps read, on the device
        self._captured_keys = [0, 0]  # those that the host knows of: read, visible
        own = DynamicCache(config=config).layers
        paged = {i for i, layer in enumerate(own) if type(layer) is DynamicLayer}
        moved = paged - {*hip.dense_layers} if offload else set[int]()
        if moved and hip.meter != "off":
            hint = "the meter reads keys that no step needs: leave out one of the two"
            raise ArgumentError("offload", 'None with meter = "sampled"', str(offload), hint)
        shared = OffloadedLayers(offload, len(moved), hip) if offload else None
        stores: dict[int, MakeStore] = dict.fromkeys(moved, shared.make_store) if shared else {}
        meters = {i: Meter(i) for i in paged} if hip.meter == "sampled" else {}
        super().__init__(
            layers=[
                HiPCacheLayer(
                    page_size, hip.index_form, stores.get(i, ResidentPages), meters.get(i)
                )
                if i in paged
                else layer
                for i, layer in enumerate(own)
            ]
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the new keys and values of a layer; returns what its attention reads.

        key_states, value_states: `[batch, num_kv_heads, new, head_dim]`.

        Raises:
            ArgumentError: an earlier step ended between layers, which hold different tokens now.
        """
        # Equal to the last call's in all layers of a step but the first: that one looks at all.
        step = (_length(self.layers[layer_idx]), key_states.shape[2])
        if step != self._step:
            self._check_even(*step)
            self._step = step
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_even(self, length: int | None, new: int = 0) -> None:
        """Every layer holds `length` tokens, or has got the `new` ones of this step already."""
        lengths = {_length(layer) for layer in self.layers} - {None}
        if length is not None and not lengths <= {length, length + new}:
            raise _unfinished()

    def crop(self, tokens_to_remove: Any) -> None:
        """Removes -n tokens from every layer.

        Raises:
            ArgumentError: a step failed half-way, or some of these tokens are padding.
        """
        self._check_even(_length(self.layers[0]))
        if any(layer.unfinished for layer in self.paged_layers):
            raise _unfinished()
        self._step = None
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self._step = None
        super().reset()

    @property
    def nbytes(self) -> int:
        """Bytes held by the pages of all layers, those of the index included."""
        return self.host_nbytes + self.device_nbytes

    @property
    def host_nbytes(self) -> int:
        """Those of them that are offloaded: in host memory or in a file."""
        return sum(layer.pages.host_nbytes for layer in self.paged_layers)

    @property
    def device_nbytes(self) -> int:
        """Those beside the model."""
        return sum(layer.pages.device_nbytes for layer in self.paged_layers)

    def count_keys(self) -> tuple[float, float]:
        """Keys read by all rows of the pruned layers so far, and those a dense layer would read."""
        accounts = [layer.account for layer in self.paged_layers]
        read, visible = self._captured_keys
        counted = 0.0 if self._captured_read is None else float(self._captured_read)
        return (
            sum(account.keys_read for account in accounts) + read + counted,
            sum(account.keys_visible for account in accounts) + visible,
        )

    def unread_mass(self) -> dict[int, UnreadMass]:
        """By layer, the attention that metered rows left unread so far: an estimate.

        Empty unless `config.hip` had `meter = "sampled"` when the cache was made. Steps that
        `capture_decode` repeats are not metered.
        """
        meters = [layer.meter for layer in self.paged_layers]
        return {meter.layer: meter.mass for meter in meters if meter is not None}

    def count_loads(self) -> tuple[int, int]:
        """Tiles of offloaded keys and values that all steps needed, and that they had to load.

        Of models on a GPU; a tile is `hipserve.offload.TILE_SIZE` keys of one head.
        """
        counts = [layer.pages.count_loads() for layer in self.paged_layers]
        return sum(needed for needed, _ in counts), sum(loaded for _, loaded in counts)

    @property
    def paged_layers(self) -> list[HiPCacheLayer]:
        """Those that are no sliding-window layers of the model, in order."""
        return [layer for layer in self.layers if isinstance(layer, HiPCacheLayer)]

    @contextlib.contextmanager
    def captured(self, keys: Sequence[CapturedKeys]) -> Generator[None]:
        """Within, each paged layer goes by its entry of `keys`, and the host counts no tokens."""
        layers = self.paged_layers
        for layer, own in zip(layers, keys, strict=True):
            layer.go_by(own)
        try:
            yield
        finally:
            for layer in layers:
                layer.go_by(None)

    def reserve_step(self) -> None:
        """Makes room for one more token of every sequence."""
        for layer in self.paged_layers:
            layer.pages.reserve([1] * len(layer.pages.lengths))

    def advance_step(self) -> list[int]:
        """One more token of every sequence was written in every layer; returns the lengths."""
        for layer in self.paged_layers:
            layer.pages.advance([1] * len(layer.pages.lengths))
            layer.seen += 1
        return self.paged_layers[0].pages.lengths

    def captured_read(self, device: torch.device) -> Tensor:
        """`[]` float64, to which captured steps add the keys that they read."""
        if self._captured_read is None:
            self._captured_read = torch.zeros((), dtype=torch.float64, device=device)
        return self._captured_read

    def count_captured(self, visible: int, *, everything: bool) -> None:
        """Adds the keys that dense attention would read in a captured step; it reads everything or
        counts on the device."""
        self._captured_keys[0] += visible if everything else 0
        self._captured_keys[1] += visible
