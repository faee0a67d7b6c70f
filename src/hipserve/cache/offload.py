"""What the offloaded layers of one cache share, and the memory that each of them gets."""

from __future__ import annotations

from torch import Tensor

from hipserve.cache.host import GRANULARITY, MappedFile
from hipserve.cache.mapped import MappedPages
from hipserve.cache.store import PageStore
from hipserve.config import HiPConfig, IndexForm
from hipserve.errors import ArgumentError
from hipserve.offload import Offload


class OffloadedLayers:
    """The memory of offloaded layers: each gets an equal share of it.

    Args:
        offload: where keys and values go.
        num_layers: layers that share it.
        config: what the layers search with.

    Raises:
        ArgumentError: a search with `config` reads the keys themselves.
        FitError: there is less room than `offload` asks for.
    """

    def __init__(self, offload: Offload, num_layers: int, config: HiPConfig) -> None:
        if config.code_bits == 16:
            hint = 'set model.config.hip = {"code_bits": 4, "rerank": 8}'
            expected = "a search on codes of the keys, code_bits 4 or 8"
            raise ArgumentError("offload", expected, "code_bits 16, which reads all keys", hint)
        share = offload.host_bytes // max(num_layers, 1)
        self._share, self._taken = share // GRANULARITY * GRANULARITY, 0
        if not self._share:
            expected = f"host_memory of {num_layers * GRANULARITY} bytes or more"
            raise ArgumentError("offload", expected, f"{offload.host_bytes} bytes")
        self._file = None
        if offload.file is not None:
            self._file = MappedFile(offload.file, num_layers * self._share)

    def make_store(self, page_size: int, form: IndexForm, k: Tensor) -> PageStore:
        """The memory of the next layer, whose keys k are `[..., num_kv_heads, head_dim]`.

        Raises:
            ArgumentError: these keys are on no CPU, or there is no file for them.
            FitError: a layer's share has no room for a page.
        """
        if k.device.type != "cpu":
            hint = "leave offload out: keys of GPUs are not offloaded yet"
            raise ArgumentError("offload", "a model on a CPU", f"keys on {k.device}", hint)
        if self._file is None:
            hint = 'pass Offload(host_memory=..., file="/nvme/kv")'
            raise ArgumentError("offload", "a file, for a model on a CPU", "none", hint)
        memory = self._file.stretch(self._taken * self._share, self._share)
        self._taken += 1
        return MappedPages(page_size, form, k, memory)
