"""Decode steps of one layer at several lengths, in turn: what depth that follows length costs.

    python benchmarks/depth.py 128k,1M,4M

Of each length: milliseconds of processor time of a step and of its search, medians; the search
without long runs; and bytes of the index. One KV head for four query heads of 128, bfloat16, one
thread. 4M keys take 6 GB, and 12 GB while they are made.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial

import torch

from hipserve import HiPConfig
from hipserve.cli.numbers import at_least, parse_count
from hipserve.lab.speed.decode import PAGE_SIZE, Decode
from hipserve.lab.speed.inputs import LayerShape
from hipserve.lab.speed.timing import Contender, Limits, in_turn, sweep
from hipserve.ops import select_blocks
from hipserve.plan import runs_of_pages
from hipserve.types import KeyIndex
from options import launch

SHAPE = LayerShape(num_q_heads=4, num_kv_heads=1)


def select(case: Decode, index: KeyIndex, turn: int) -> object:
    """The search of one step in this index."""
    return select_blocks(case.query(turn), index, case.layouts[-1], rule=case.rule, **case.options)


def shallow(index: KeyIndex) -> KeyIndex:
    """The same without runs longer than a page."""
    assert index.summaries is not None
    return replace(index, summaries=index.summaries[:, : runs_of_pages(PAGE_SIZE, index.run_size)])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lengths", help="keys, with commas between")
    parser.add_argument("--rounds", type=at_least(1), default=61)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lengths = [parse_count(n) for n in asked.lengths.split(",")]
    cases = {n: Decode(SHAPE, n, torch.bfloat16, HiPConfig(), "auto") for n in lengths}
    contenders: dict[str, Contender] = {}
    for n, case in cases.items():
        held = sum(x.nbytes for x in case.index.tensors())
        pool = case.pool.k_cache.nbytes + case.pool.v_cache.nbytes
        say(f"{n:>9,} keys: index {held:,} bytes, {held / pool:.2%} of keys and values")
        contenders[f"{n:>9,} step"] = Contender(partial(case.step, reuse=None))
        contenders[f"{n:>9,} search"] = Contender(partial(select, case, case.index))
        without = Contender(partial(select, case, shallow(case.index)))
        contenders[f"{n:>9,} search without long runs"] = without
    memory = torch.zeros(64 * 2**20)
    limits = Limits(asked.rounds, 60.0, "cpu")
    for name, times in in_turn(contenders, limits, before=lambda: sweep(memory)).items():
        say(f"{name}: {1e3 * statistics.median(times):.3f} ms")


if __name__ == "__main__":
    launch(main)
