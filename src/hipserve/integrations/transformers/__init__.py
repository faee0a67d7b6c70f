"""`attn_implementation="hip"` for unmodified transformers models, and the cache that goes with it.

`register` makes the implementation known to transformers. `HiPCache`, passed as `past_key_values`,
keeps keys and values in pages, and a decode step neither copies nor reads the whole cache. Without
it HiP attention runs over the tensors that transformers' own caches hand out. `capture_decode`
records the decode steps of a model on a GPU.
"""

from hipserve.integrations.transformers.cache import HiPCache, HiPCacheLayer, PagedHandle
from hipserve.integrations.transformers.capture import capture_decode
from hipserve.integrations.transformers.forward import hip_forward
from hipserve.integrations.transformers.masks import MaskDescription, describe_mask
from hipserve.integrations.transformers.positions import extend_positions
from hipserve.integrations.transformers.registration import check_model, register
from hipserve.integrations.transformers.settings import NAME, config_of

__all__ = [
    "NAME",
    "HiPCache",
    "HiPCacheLayer",
    "MaskDescription",
    "PagedHandle",
    "capture_decode",
    "check_model",
    "config_of",
    "describe_mask",
    "extend_positions",
    "hip_forward",
    "register",
]
