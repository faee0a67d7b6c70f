"""What a model loses if a single head is pruned and all others are dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hipserve.attention import hip_attention
from hipserve.config import HiPConfig
from hipserve.lab.quality.beside import read_beside, read_reference
from hipserve.lab.recorder import Call, Watcher, watched
from hipserve.models import LoadedModel

Head = tuple[int, int]
"""Layer and KV head."""


def head_losses(
    loaded: LoadedModel,
    ids: Tensor,
    heads: Sequence[Head],
    config: HiPConfig,
    progress: Callable[[str], None] | None = None,
) -> dict[Head, float]:
    """Nats per token, KL(dense || that head pruned), over the last half of `ids` `[1, tokens]`.

    One pass of the model for each KV head, with the query heads that read it.
    """
    loaded.use(None)
    first = ids.shape[1] // 2
    reference = read_reference(loaded, ids, first)
    losses: dict[Head, float] = {}
    for layer, head in heads:
        if progress:
            progress(f"without layer {layer}, head {head}")
        with watched(loaded, _prune(layer, head, config)):
            losses[layer, head] = float(read_beside(loaded, ids, first, reference).kl.mean())
    return losses


def _prune(layer: int, head: int, config: HiPConfig) -> Watcher:
    """Replaces what one KV head's query heads return by what pruned attention returns."""
    config = config.of_layer(layer, slice(head, head + 1))

    def replace(call: Call, out: Tensor) -> Tensor:
        if call.layer != layer:
            return out
        group = call.query.shape[1] // call.key.shape[1]
        rows = slice(head * group, (head + 1) * group)
        q = call.query[:, rows].transpose(1, 2)
        k, v = (x[:, head : head + 1].transpose(1, 2) for x in (call.key, call.value))
        changed = out.clone()
        changed[:, :, rows] = hip_attention(
            q, k, v, config=config, sm_scale=call.scale, softcap=call.softcap
        )
        return changed

    return replace
