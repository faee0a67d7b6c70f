"""Host memory behind vLLM's `OffloadingConnector`, for machines where vLLM copies to none."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostSpec(CPUOffloadingSpec):
    """vLLM's own, except that torch copies; a chunk is one block."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if self._worker is None:
            self._worker = HostWorker(kv_caches, self.num_chunks)  # type: ignore[assignment]
        assert self._worker is not None
        return self._worker


class HostWorker(OffloadingWorker):
    """Copies blocks as vLLM's workers do: keys and values, without the padding behind them."""

    def __init__(self, kv_caches: Any, num_chunks: int) -> None:
        (self.refs,) = kv_caches.group_data_refs
        self.blocks = [
            one.tensor.view(torch.int8).view(-1, one.page_size_bytes) for one in kv_caches.tensors
        ]
        self.chunks = [
            torch.zeros(num_chunks, one.shape[1], dtype=torch.int8) for one in self.blocks
        ]
        self.done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self.blocks, src_spec, self.chunks, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self.chunks, src_spec, self.blocks, dst_spec)

    def _copy(self, job_id: int, sources: Any, src: Any, targets: Any, dst: Any) -> bool:
        for ref in self.refs:
            source, target = sources[ref.tensor_idx], targets[ref.tensor_idx]
            keys = source[src.block_ids, : ref.page_size_bytes]
            target[dst.block_ids, : ref.page_size_bytes] = keys
        self.done.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Every copy is done when it has been submitted."""
