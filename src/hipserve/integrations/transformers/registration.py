"""How transformers learns of the attention and its masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from transformers import AttentionInterface, AttentionMaskInterface

from hipserve.config import DEFAULT, HiPConfig
from hipserve.errors import ArgumentError
from hipserve.integrations.transformers.forward import hip_forward
from hipserve.integrations.transformers.masks import describe_mask
from hipserve.integrations.transformers.settings import NAME


@dataclass(frozen=True)
class Registered:
    """`hip_forward` as it stands in transformers' table, with what models run that carry nothing.

    Attributes:
        config: settings of models without `config.hip`.
    """

    config: HiPConfig = DEFAULT

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return hip_forward(*inputs, **options)


def register(config: HiPConfig | None = None) -> None:
    """Registers `attn_implementation="hip"`; `config` is for models that carry none.

    Without `config` an earlier one stays.

    A model's own settings, `model.config.hip = {...}` with the keys of `HiPConfig`, come first;
    `save_pretrained` writes them and `from_pretrained` reads them back.
    """
    if not (config is None or isinstance(cast("object", config), HiPConfig)):
        raise ArgumentError("config", "a HiPConfig", type(config).__name__)
    if config is not None or NAME not in AttentionInterface():
        AttentionInterface.register(NAME, Registered(config or DEFAULT))
    AttentionMaskInterface.register(NAME, describe_mask)


def check_model(model_class: Any, config: Any) -> None:
    """A model can run with `attn_implementation="hip"`; asked before weights are loaded.

    Raises:
        ArgumentError: its attention does not go through transformers' interface, or is latent.
    """
    name = model_class.__name__
    through = getattr(model_class, "_can_set_attn_implementation", lambda: True)()
    text = config.get_text_config(decoder=True)
    latent = getattr(text, "kv_lora_rank", None) or getattr(text, "index_topk", None)
    if through and not latent:
        return
    why = "keeps latent keys (MLA)" if through else "computes attention itself"
    raise ArgumentError(
        "model",
        "one whose attention goes through transformers' AttentionInterface, as Llama's does",
        f"{name}, which {why}",
        "choose a Llama, Qwen, Mistral, Gemma, GPT-OSS or Granite model, or run this one "
        'with transformers and attn_implementation="sdpa" or "eager"',
    )
