"""KV blocks in fp8: what vLLM hands out, what is refused, without an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.kv_cache_interface import FullAttentionSpec

from hipserve import BackendError, ConfigError, HiPConfig
from hipserve.config import IndexForm
from hipserve.integrations.vllm import backend, kv_block, layer, limits
from hipserve.offload import Offload
from hipserve.ops import write_kv
from hipserve.ops.fp8 import to_pages


def test_a_gpu_keeps_keys_in_fp8() -> None:
    for cache in limits.FP8_CACHES:
        limits.check_cache_dtype(cache, "bfloat16", "cuda")
        assert backend.HiPBackend.supports_kv_cache_dtype(cache)
    expected = "bfloat16, as the model computes, or fp8, got int8_per_token_head"
    with pytest.raises(ConfigError, match=expected):
        limits.check_cache_dtype("int8_per_token_head", "bfloat16", "cuda")
    engine = limits.Engine("cuda", None, "bfloat16", "fp8")
    with pytest.raises(ConfigError, match="connector, got keys and values in fp8"):
        limits.check_offload(Offload(host_memory=9), HiPConfig(code_bits=4), engine)


def test_a_gpu_that_reads_no_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for cache in ("auto", "bfloat16", "fp8_e5m2"):
        layer.refuse_without_fp8(torch.device("cuda"), cache)
    with pytest.raises(BackendError, match=r"capability 8.9.*fp8_e5m2, or leave"):
        layer.refuse_without_fp8(torch.device("cuda"), "fp8")


@pytest.mark.parametrize("form", [IndexForm(16, 16), IndexForm(16, 4), IndexForm(None, 8)])
@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e5m2"])
def test_blocks_of_bytes_hold_fp8(cache_dtype: str, form: IndexForm) -> None:
    """As vLLM hands them out: half the bytes, keys before values, and the index behind them."""
    dtype = kv_block.PAGE_DTYPES[cache_dtype]
    sizes: Any = {"block_size": 64, "num_kv_heads": 2, "head_size": 64}
    quantised = FullAttentionSpec(dtype=torch.uint8, **sizes)
    plain = FullAttentionSpec(dtype=torch.bfloat16, **sizes)
    config = HiPConfig(selector="bound" if form.run_size else "tree", code_bits=form.code_bits)
    layout, whole = (kv_block.BlockLayout.of(x, config) for x in (quantised, plain))
    assert layout.form == form
    assert layout.content_bytes == whole.content_bytes / 2
    assert layout.index_bytes == whole.index_bytes
    stride = layout.padded_bytes
    raw = torch.full((3 * stride,), 0x7F, dtype=torch.uint8)  # NaN
    cache = raw.as_strided((3, 2, 64, 128), (stride, 128, 256, 1))
    scales = kv_block.Fp8(dtype, 0.5, 3.0)
    pages = kv_block.pages_of(cache, form, fp8=scales)
    assert kv_block.pages_of(cache, form, fp8=scales) is pages
    k, v = torch.randn(2, 64, 2, 64, dtype=torch.bfloat16)
    write_kv(k, v, pages.pool, pages.index, 64 + torch.arange(64), backend="reference")
    held = cache[1].view(dtype).transpose(0, 1)
    assert torch.equal(held[..., :64].float(), to_pages(k, dtype, 0.5).float())
    assert torch.equal(held[..., 64:].float(), to_pages(v, dtype, 3.0).float())
    assert bool((cache[[0, 2]] == 0x7F).all())
    before = [x[1].clone() for x in pages.index.tensors()]
    for x in pages.index.tensors():
        x[1].zero_()
    kv_block.rebuild_index(pages, torch.tensor([1]))
    for x, expected in zip(pages.index.tensors(), before, strict=True):
        assert torch.equal(x[1], expected)
    reloaded = kv_block.pages_of(cache, form, fp8=kv_block.Fp8(dtype, 0.25, 3.0))
    assert reloaded.pool.k_scale == 0.25
