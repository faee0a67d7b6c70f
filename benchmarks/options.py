"""Options of the benchmarks: what cannot be used ends in a sentence, as in `hipserve`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

import torch
import typer

from hipserve.errors import BackendError, HipserveError


def launch(main: Callable[[], None]) -> None:
    """Runs a benchmark; an option that it cannot use is a sentence and exit code 2."""
    try:
        main()
    except (HipserveError, typer.BadParameter) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def head_counts(text: str) -> tuple[int, int]:
    """`8/2` as 8 query heads and 2 KV heads."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) % int(found[2]):
        wrong = f"{text!r}: write query heads / KV heads, the first a multiple of the second: 8/2"
        raise argparse.ArgumentTypeError(wrong)
    return int(found[1]), int(found[2])


def need_gpu(device: str = "cuda") -> None:
    """Refuses a machine whose torch sees no GPU, where `device` is one.

    Raises:
        BackendError: there is none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BackendError("this benchmark needs a GPU that torch can use, and sees none")
