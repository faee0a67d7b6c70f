"""How much of a system prompt the rows of an answer read, layer by layer."""

from __future__ import annotations

from transformers import Cache

from hipserve.attention.meter import Attended, Meter
from hipserve.integrations.transformers import HiPCache
from hipserve.integrations.transformers.cache import HiPCacheLayer
from hipserve.lab.intervals import mean


class SystemReads(Meter):
    """Watches one layer, where a meter does: it counts the system prompt's keys that rows read.

    Of the query block that a row belongs to: sinks, chosen blocks and window, mean over heads.

    Attributes:
        shares: of the system prompt, of each pruned row.
    """

    def __init__(self, layer: int, tokens: int, start: int) -> None:
        """The first `tokens` keys are the system prompt; rows from position `start` on count."""
        super().__init__(layer)
        self.shares: list[float] = []
        self._tokens, self._start = tokens, start

    def measure(self, call: Attended) -> None:
        """Of the last row of a call of a single sequence."""
        size, sinks = call.config.key_block_size, call.config.num_sink_tokens
        *_, count, position = call.layout.host_blocks(call.rule.query_block_size)[-1]
        if position + count <= self._start:
            return
        window = max(int(call.selection.window_start[-1]), sinks)
        known = min(sinks, self._tokens) + max(self._tokens - window, 0)
        first = call.selection.indices[-1].long() * size  # [heads, max_selected]; negative is none
        chosen = (self._tokens - first).clamp(0, size).masked_fill(first < 0, 0).sum(-1)
        self.shares.append((known + float(chosen.double().mean())) / self._tokens)

    @property
    def share(self) -> float:
        """Mean of the rows that were pruned; 1 where none was."""
        return mean(self.shares) if self.shares else 1.0


def watch(cache: Cache, tokens: int, start: int) -> list[SystemReads]:
    """Watches every layer of a `HiPCache` without a window; none of another cache.

    Args:
        tokens: of the system prompt; 0 watches nothing.
        start: position of the first row that counts.
    """
    if not (isinstance(cache, HiPCache) and tokens):
        return []
    found: list[SystemReads] = []
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, HiPCacheLayer):
            found.append(SystemReads(i, tokens, start))
            layer.meter = found[-1]
    return found
