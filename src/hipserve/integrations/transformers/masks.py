"""Masks as records instead of matrices: O(1) for any length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from hipserve.errors import ArgumentError


@dataclass(eq=False)
class MaskDescription:
    """Which keys the rows of a batch may read: causal, a window, and which keys are padding."""

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    sliding_window: int
    key_valid: Tensor | None
    _valid_rows: dict[Any, Tensor | None] = field(default_factory=dict, repr=False)
    _agrees: dict[Any, bool] = field(default_factory=dict, repr=False)
    _holes: dict[Any, bool] = field(default_factory=dict, repr=False)

    ndim: ClassVar[int] = 4  # transformers does not change a mask of four axes

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch_size, 1, self.q_length, self.kv_length)

    def contiguous(self) -> MaskDescription:
        return self

    def to(self, *_: Any, **__: Any) -> MaskDescription:
        return self

    def __getitem__(self, _: Any) -> Any:
        raise _no_matrix("a mask that is cut")

    @classmethod
    def __torch_function__(cls, func: Any, *_: Any, **__: Any) -> Any:
        raise _no_matrix(f"a mask that reached {getattr(func, '__name__', func)}")

    def valid_rows(self, kv_length: int, rows: int, device: torch.device) -> Tensor | None:
        """`[batch, rows]` of the last of `kv_length` keys, or None where all of them count.

        Found once for all layers of a device: each time waits for it.

        Raises:
            ArgumentError: the mask has fewer columns than there are keys.
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

    def check_held(self, held: int, padded: Sequence[tuple[int, Tensor]]) -> None:
        """Checks that the mask hides the same of the `held` keys as when the cache read them.

        `padded`: where columns with padding begin, and which of them count `[batch, columns]`. The
        layers that share these tensors compare them once.

        Raises:
            ArgumentError: it hides other keys.
        """
        asked = (held, *((start, id(valid)) for start, valid in padded))
        if held and asked not in self._agrees:
            self._agrees[asked] = self._hides_the_same(held, padded)
        if held and not self._agrees[asked]:
            got = "none" if self.key_valid is None else "one that hides others"
            hint = "read the text again with this mask and a new cache, or use DynamicCache"
            expected = f"a mask that hides of the {held} cached keys those that it hid before"
            raise ArgumentError("attention_mask", expected, got, hint)

    def _hides_the_same(self, held: int, padded: Sequence[tuple[int, Tensor]]) -> bool:
        if self.key_valid is None:
            return not padded
        before = self.key_valid[:, :held].bool()
        expected = torch.ones_like(before)
        for start, valid in padded:
            expected[:, start : start + valid.shape[1]] = valid.to(before.device)
        return torch.equal(before, expected)

    def has_holes(self, kv_length: int, device: torch.device) -> bool:
        """Some sequence has padding between tokens that count; found once for all layers."""
        asked = (kv_length, device)
        if asked not in self._holes:
            valid = self.valid_rows(kv_length, kv_length, device)
            self._holes[asked] = valid is not None and _has_holes(valid)
        return self._holes[asked]


def _no_matrix(got: str) -> ArgumentError:
    return ArgumentError(
        "attn_implementation",
        'for "hip" a model whose attention goes through transformers\' AttentionInterface',
        f"one that computes with masks itself ({got})",
        'use attn_implementation="eager" for ALiBi, position biases and attention of its own',
    )


def _has_holes(valid: Tensor) -> bool:
    """`valid` `[batch, columns]`: tokens that count begin more than once in some row."""
    begins = valid[:, 1:] & ~valid[:, :-1]
    return bool((valid[:, 0] + begins.sum(1) > 1).any())


@torch.compiler.disable
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
    parts = _parts(mask_function)
    strange = [name for name in parts if not name.startswith(CAUSAL_PARTS)]
    if strange or (any(name.startswith(WINDOW_PART) for name in parts) and not windowed):
        raise ArgumentError(
            "attention_mask",
            "a causal or sliding-window mask, padded or not",
            strange[0] if strange else getattr(mask_function, "__qualname__", "another mask"),
            'use attn_implementation="sdpa" for packed, bidirectional or custom masks',
        )
    # Offsets may be live tensors that a cache changes later: int() takes their value now.
    return MaskDescription(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=int(kv_length),
        q_offset=int(q_offset),
        kv_offset=int(kv_offset),
        sliding_window=local_size or 0,
        key_valid=attention_mask,
    )


WINDOW_PART = "sliding_window_overlay"
CAUSAL_PARTS = ("causal_mask_function", "and_masks", WINDOW_PART)
"""What a causal mask or a sliding window is made of; chunks and packed sequences have more."""


def _parts(mask_function: Any) -> list[str]:
    """Names of a mask function of transformers and of all that it is made of."""
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__)
    held = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    if name.startswith("packed_sequence_mask_function") and not any(map(_packs, held)):
        return []
    inner = [part for x in held for part in (x if isinstance(x, tuple | list) else [x])]
    return [name, *(n for part in inner if callable(part) for n in _parts(part))]


def _packs(sequences: object) -> bool:
    """`[batch, columns]`: the sequence of each token; under torch.compile it is always there."""
    return isinstance(sequences, Tensor) and bool((sequences != sequences[:, :1]).any())
