"""How transformers learns of the attention and its masks."""

from __future__ import annotations

from typing import cast

from transformers import AttentionInterface, AttentionMaskInterface

from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError
from hipserve.integrations.transformers.forward import hip_forward
from hipserve.integrations.transformers.masks import describe_mask
from hipserve.integrations.transformers.settings import NAME, set_default


def register(config: HiPConfig | None = None) -> None:
    """Registers `attn_implementation="hip"`; `config` is for models that carry none.

    A model's own settings, `model.config.hip = {...}` with the keys of `HiPConfig`, come first;
    `save_pretrained` writes them and `from_pretrained` reads them back.
    """
    if not (config is None or isinstance(cast("object", config), HiPConfig)):
        raise ArgumentError("config", "a HiPConfig", type(config).__name__, "build one")
    if config is not None:
        set_default(config)
    AttentionInterface.register(NAME, hip_forward)
    AttentionMaskInterface.register(NAME, describe_mask)
