"""What the offloaded layers of one cache share, and the memory that each of them gets."""

from __future__ import annotations

from torch import Tensor

from hipserve.cache.host import GRANULARITY, MappedFile, PinnedMemory, check_memory
from hipserve.cache.mapped import MappedPages
from hipserve.cache.staging import Staging
from hipserve.cache.store import HostedStore
from hipserve.cache.tiles import TiledPages, row_tiles
from hipserve.config import HiPConfig, IndexForm
from hipserve.errors import ArgumentError
from hipserve.offload import TILE_SIZE, Offload


class OffloadedLayers:
    """The memory of offloaded layers: each gets an equal share of it.

    Args:
        offload: where keys and values go.
        num_layers: layers that share it.
        config: what the layers search with.
        longest: keys of a sequence for which there is staging from the beginning, and for good; 0
            takes it as it is needed.

    Raises:
        ArgumentError: a search with `config` reads the keys themselves.
        FitError: there is less room than `offload` asks for.
    """

    def __init__(
        self, offload: Offload, num_layers: int, config: HiPConfig, longest: int = 0
    ) -> None:
        if config.code_bits == 16:
            hint = 'set model.config.hip = {"code_bits": 4, "rerank": 8}'
            expected = "a search on codes of the keys, code_bits 4 or 8"
            raise ArgumentError("offload", expected, "code_bits 16, which reads all keys", hint)
        share = offload.host_bytes // max(num_layers, 1)
        self._share, self._taken = share // GRANULARITY * GRANULARITY, 0
        if not self._share:
            expected = f"host_memory of {num_layers * GRANULARITY} bytes or more"
            raise ArgumentError("offload", expected, f"{offload.host_bytes} bytes")
        self._config, self._device_share = config, offload.device_bytes // max(num_layers, 1)
        self._longest = longest
        self._file: MappedFile | None = None
        self._staging: dict[object, Staging] = {}  # of layers whose pages are alike
        if offload.file is None:
            check_memory(offload.host_bytes)
        else:
            self._file = MappedFile(offload.file, num_layers * self._share)

    def make_store(self, page_size: int, form: IndexForm, k: Tensor) -> HostedStore:
        """The memory of the next layer, whose keys k are `[..., num_kv_heads, head_dim]`.

        Raises:
            ArgumentError: a file is for a CPU, and a CPU needs one; or tiles would be cut.
            FitError: a layer's share has no room for a page, or for what a row reads.
        """
        if k.is_cuda:
            return self._tiled(page_size, form, k)
        if self._file is None:
            hint = 'pass Offload(host_memory=..., file="/nvme/kv")'
            raise ArgumentError("offload", "a file, for a model on a CPU", "none", hint)
        memory = self._file.stretch(self._taken * self._share, self._share)
        self._taken += 1
        return MappedPages(page_size, form, k, memory)

    def _tiled(self, page_size: int, form: IndexForm, k: Tensor) -> HostedStore:
        if self._file is not None:
            hint = "leave file out: host memory holds what a GPU does not"
            raise ArgumentError("offload", "no file, for a model on a GPU", "one", hint)
        config = self._config
        for name, value in (
            ("key_block_size", config.key_block_size),
            ("num_sink_tokens", config.num_sink_tokens),
            ("bound_block_size", config.granularity),
            ("page_size", page_size),
        ):
            if value % TILE_SIZE:
                expected = f"{name} in steps of {TILE_SIZE}, the keys of a tile"
                raise ArgumentError("offload", expected, str(value), f"change {name}")
        kind = (page_size, k.shape[-2:], k.dtype, k.device)
        if kind not in self._staging:
            self._staging[kind] = Staging(page_size, k, -(-self._longest // page_size))
        return TiledPages(
            page_size,
            form,
            k,
            memory=PinnedMemory(self._share),
            device_bytes=self._device_share,
            staging=self._staging[kind],
            floor=row_tiles(config),
        )
