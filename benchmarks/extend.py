"""What rows beyond the trained length cost: `extend="stream"` against `none`, in turn.

    python benchmarks/extend.py --length 32k --trained 8k

Search and attention of one layer at the end of a long context: a decode step and 512 rows of
prefill. Medians of milliseconds of processor time of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve import HiPConfig
from hipserve.attention import AttentionLayer
from hipserve.attention.crossover import rule_of
from hipserve.attention.layer import HeldKeys
from hipserve.cache.store import empty_pages
from hipserve.cli.numbers import at_least, parse_count
from hipserve.lab.speed.decode import PAGE_SIZE
from hipserve.lab.speed.inputs import Inputs, LayerShape, make_decode
from hipserve.lab.speed.timing import Contender, Limits, in_turn, sweep
from hipserve.ops import join_runs, select_blocks, write_kv
from hipserve.plan import BatchLayout
from hipserve.testing.cases import make_rope
from options import head_counts, launch

ROWS = 512
"""Of prefill."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The last rows of one sequence, and how they attend; `q` has other queries for every turn."""

    q: Tensor
    count: int
    keys: HeldKeys
    layer: AttentionLayer

    def _q(self, turn: int) -> Tensor:
        first = turn % (len(self.q) - self.count + 1)
        return self.q[first : first + self.count]

    def whole(self, turn: int) -> None:
        self.layer.forward(self._q(turn), self.keys)

    def select(self, turn: int) -> None:
        layer, keys = self.layer, self.keys
        select_blocks(
            self._q(turn),
            keys.index,
            keys.layout,
            config=layer.config,
            rule=layer.rule,
            rope=layer.rope,
            check=False,
        )


def rows_at_the_end(inputs: Inputs, count: int, config: HiPConfig) -> Rows:
    length = len(inputs.k)
    pages = -(-length // PAGE_SIZE)
    pool, index = empty_pages(pages, PAGE_SIZE, config.index_form, inputs.k)
    write_kv(inputs.k, inputs.v, pool, index, torch.arange(length))
    table = torch.arange(pages, dtype=torch.int32)[None]
    join_runs(index, table, [length])
    layout = BatchLayout.of(table, [length], [count])
    q, rule = inputs.q, rule_of(config, inputs.q, inputs.k.shape[1])
    rope = make_rope(q.shape[-1]) if config.streams else None
    return Rows(q, count, HeldKeys(pool, index, layout), AttentionLayer(config, rule, rope=rope))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", default="32k", help="keys")
    parser.add_argument("--trained", default="8k", help="the trained length")
    parser.add_argument("--heads", type=head_counts, default="8/2", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=at_least(1), default=128)
    parser.add_argument("--code-bits", type=int, default=16)
    parser.add_argument("--rounds", type=at_least(1), default=61)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    num_q_heads, num_kv_heads = asked.heads
    shape = LayerShape(num_q_heads, num_kv_heads, asked.head_dim)
    inputs = make_decode(shape, parse_count(asked.length), ROWS + 32, torch.bfloat16)
    none = HiPConfig(code_bits=asked.code_bits)
    stream = none.replace(extend="stream", trained_length=parse_count(asked.trained))
    contenders: dict[str, Contender] = {}
    for name, config in ("none", none), ("stream", stream):
        step, prefill = (rows_at_the_end(inputs, count, config) for count in (1, ROWS))
        for what, rows in ("a decode step", step), (f"{ROWS} rows of prefill", prefill):
            contenders[f"{what}, {name}"] = Contender(rows.whole)
            contenders[f"{what}, {name}, its search"] = Contender(rows.select)
    memory = torch.zeros(64 * 2**20)
    limits = Limits(asked.rounds, 60.0, "cpu")
    times = in_turn(contenders, limits, before=lambda: sweep(memory))
    for name, found in times.items():
        sys.stdout.write(f"{name}: {1e3 * statistics.median(found):.3f} ms\n")


if __name__ == "__main__":
    launch(main)
