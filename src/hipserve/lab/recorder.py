"""What the heads of a model see: queries, keys and values, shown while the model reads a text.

The attention function that transformers calls is wrapped for a while. Whatever it is, dense or
pruned, the model computes what it would have computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from hipserve.errors import FitError
from hipserve.models import LoadedModel
from hipserve.models.passes import make_cache, read

ROWS = 16
"""Query rows of a text that are recorded unless told otherwise."""


class Call(NamedTuple):
    """One call of the attention of one layer.

    Attributes:
        layer: its number.
        query: `[batch, num_q_heads, query_len, head_dim]`, rotated.
        key, value: `[batch, num_kv_heads, kv_len, head_dim]`, those of the cache included; handles
            of a `HiPCache` where that holds them.
        scale: of the scores.
        softcap: of the scores; 0 for none.
        window: the layer's own sliding window; 0 for none.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float
    window: int


Watcher = Callable[[Call, Tensor], Tensor]
"""Receives a call and what it returns, `[batch, query_len, num_q_heads, head_dim]`; what the
watcher returns goes to the model."""


Reader = Callable[[LoadedModel, Tensor], object]
"""Reads tokens `[1, tokens]` from the first to the last."""


@contextmanager
def watched(loaded: LoadedModel, watcher: Watcher) -> Generator[None]:
    """Shows the watcher every call of the attention that the model uses now.

    Raises:
        FitError: that is code of the model's own, which transformers does not look up.
    """
    name = loaded.model.config._attn_implementation
    if name == "eager":
        raise FitError(
            f"{loaded.name} has dense attention of its own, which cannot be watched",
            "measure it with hipserve lab quality or hipserve eval",
        )
    plain: Any = AttentionInterface()[name]
    own = {id(module) for module in loaded.model.modules()}

    @functools.wraps(plain)
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        out, weights = plain(module, query, key, value, mask, **options)
        if id(module) in own:
            out = watcher(_call(module, (query, key, value), options), out)
        return out, weights

    AttentionInterface.register(name, attend)
    try:
        yield
    finally:
        AttentionInterface.register(name, plain)


def read_watched(
    loaded: LoadedModel, ids: Tensor, watcher: Watcher, reader: Reader | None = None
) -> None:
    """Reads `ids` `[1, tokens]` with dense attention and shows the watcher every call.

    Args:
        reader: reads them and keeps what else it needs of the pass.

    Raises:
        FitError: as `watched`.
    """
    loaded.use(None)
    with watched(loaded, watcher):
        (reader or _read_all)(loaded, ids)


def _read_all(loaded: LoadedModel, ids: Tensor) -> None:
    for _ in read(loaded, ids, make_cache(loaded)):
        pass


def nothing_to_prune(loaded: LoadedModel) -> FitError:
    """The error of a model whose layers all have a window."""
    return FitError(f"{loaded.name} has no layer that reads everything: nothing can be pruned")


def _call(module: Any, tensors: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> Call:
    return Call(
        module.layer_idx,
        *tensors,
        scale=options.get("scaling") or tensors[0].shape[-1] ** -0.5,
        softcap=options.get("softcap") or 0.0,
        window=options.get("sliding_window") or 0,
    )


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """Queries of chosen rows and all keys of one layer.

    Attributes:
        layer: its number.
        queries: `[rows, num_q_heads, head_dim]`.
        keys: `[tokens, num_kv_heads, head_dim]`.
        scale, softcap: of the scores.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    scale: float
    softcap: float

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[1]

    def scores(self, head: int, begin: int, end: int) -> Tensor:
        """`[rows, group, end - begin]` float32: what the query heads of a KV head score keys."""
        group = self.queries.shape[1] // self.num_kv_heads
        rows = self.queries[:, head * group : (head + 1) * group].float()
        scores = rows @ self.keys[begin:end, head].float().T * self.scale
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores


@torch.no_grad()
def record_heads(
    loaded: LoadedModel, ids: Tensor, positions: Tensor, reader: Reader | None = None
) -> list[LayerRecord]:
    """Reads `ids` `[1, tokens]` with dense attention; the layers without a window of their own.

    Args:
        positions: `[rows]` int64 ascending, of the rows whose queries are kept.
        reader: as in `read_watched`.

    Raises:
        FitError: every layer has a window of its own, so there is nothing to prune.
    """
    rows: dict[int, list[Tensor]] = {}
    last: dict[int, Call] = {}

    def keep(call: Call, out: Tensor) -> Tensor:
        if not call.window:
            first = call.key.shape[2] - call.query.shape[2]
            inside = positions[(positions >= first) & (positions < call.key.shape[2])] - first
            rows.setdefault(call.layer, []).append(call.query[0, :, inside].transpose(0, 1))
            last[call.layer] = call._replace(query=call.query[:, :, :0], value=call.value[:, :, :0])
        return out

    read_watched(loaded, ids, keep, reader)
    if not last:
        raise nothing_to_prune(loaded)
    return [
        LayerRecord(i, torch.cat(rows[i]), call.key[0].transpose(0, 1), call.scale, call.softcap)
        for i, call in sorted(last.items())
    ]
