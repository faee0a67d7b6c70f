"""lm-eval with HiP attention: `--model hip`, and `attn_implementation=hip` for `--model hf`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from typing import Any

from hipserve.config import HiPConfig
from hipserve.errors import HipserveError
from hipserve.integrations.transformers import HiPCache, register

VERSION = "0.4.13"
"""The version of lm-eval that was tested."""
OPTIONS = {"preset", *(field.name for field in dataclasses.fields(HiPConfig))}


def main() -> None:
    """`hipserve-lm-eval`: lm-eval's own command, which knows HiP attention."""
    try:
        register_model()
    except HipserveError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
    _lm_eval("__main__").cli_evaluate()


@functools.cache
def register_model() -> Any:
    """Registers HiP attention with transformers, and the model `hip` with lm-eval: its class.

    It is lm-eval's `hf` with HiP attention in prefill and decode; lm-eval itself generates with
    transformers' cache, where decode steps read every key. Fields of `HiPConfig` and `preset` among
    its arguments make `model.config.hip`.

    Raises:
        HipserveError: lm-eval is not installed.
    """
    base = _lm_eval("models.huggingface").HFLM

    class HiPLM(base):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self, pretrained: str, **options: Any) -> None:
            hip = {name: options.pop(name) for name in OPTIONS & options.keys()}
            HiPConfig.from_dict(dict(hip))  # raises before weights are loaded
            super().__init__(pretrained, **{"attn_implementation": "hip", **options})
            if hip:
                self.model.config.hip = hip

        def _model_generate(self, context: Any, **options: Any) -> Any:
            cache = HiPCache(self.model.config)
            return super()._model_generate(context, past_key_values=cache, **options)

    register()
    return _lm_eval("api.registry").register_model("hip")(HiPLM)


def _lm_eval(module: str) -> Any:
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lm_eval"):
            raise
        hint = f"pip install lm-eval=={VERSION}"
        raise HipserveError("lm-eval is not installed", hint) from None
