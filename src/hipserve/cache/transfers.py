"""Copies between host and device behind what the device computes: the only file with streams."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import torch
from torch import Tensor


class CopyStream:
    """Copies that run while the device computes; on a CPU, in place and at once.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending = False

    @contextlib.contextmanager
    def behind(self, *tensors: Tensor) -> Generator[None]:
        """What is launched in this context starts after all that was launched before.

        tensors: memory of the device that it reads or writes.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._pending = True
        with torch.cuda.stream(self._stream):
            yield
        for x in tensors:
            x.record_stream(self._stream)

    def wait(self) -> None:
        """What is launched from here on starts after the copies; the host does not wait."""
        if self._stream is not None and self._pending:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._pending = False


def sent(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """An int64 tensor of these values on the device, for which the host does not wait."""
    made = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)
