"""A model by name: the bundled one without a network, or any checkpoint transformers can load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, FitError
from hipserve.integrations.transformers import register
from hipserve.models.bundled import BUNDLED, bundled_path
from hipserve.models.gguf import load_gguf
from hipserve.models.gguf_files import find_gguf
from hipserve.platform import check_device, default_device, describe_backend

Turn = dict[str, str]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model, its tokenizer, and what it can take.

    Attributes:
        model: the transformers model, `attn_implementation="hip"`.
        tokenizer: its tokenizer.
        name: what the user called it.
        max_context: tokens of prompt and answer together.
        stop_strings: ends of an answer, for a model that seldom ends its turn by itself.
    """

    model: Any
    tokenizer: Any
    name: str
    max_context: int
    stop_strings: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def backend(self) -> str:
        """What computes attention now: a backend of ours, or torch's dense SDPA."""
        if self.model.config._attn_implementation != "hip":
            return "torch SDPA"
        return describe_backend(self.device, self.model.dtype, self.head_dim)

    @property
    def head_dim(self) -> int:
        config = self.model.config
        own = getattr(config, "head_dim", None)
        return own or config.hidden_size // config.num_attention_heads

    def use(self, config: HiPConfig | None) -> None:
        """Switches to HiP attention with `config`, or with None to transformers' dense SDPA."""
        self.model.set_attn_implementation("hip" if config else "sdpa")
        self.model.config.hip = config.to_dict() if config else None

    def encode(self, turns: list[Turn]) -> torch.Tensor:
        """`[1, tokens]` int64 of a conversation whose last turn is the user's, ready to answer.

        A tokenizer without a chat template gets the contents one after the other.

        Raises:
            ArgumentError: a turn holds half of a surrogate pair, which no tokenizer reads.
        """
        for turn in turns:
            _check_text(turn["content"])
        if self.tokenizer.chat_template:
            ids = self.tokenizer.apply_chat_template(
                _joined(turns) if self.name != BUNDLED else turns,
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"]
        else:
            text = "\n\n".join(turn["content"] for turn in turns) + "\n\n"
            ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return ids.to(self.device)

    def check_fit(self, num_tokens: int, max_new_tokens: int) -> None:
        """Raises FitError, with the sum, where prompt and answer exceed the context."""
        total = num_tokens + max_new_tokens
        if total <= self.max_context:
            return
        room, surplus = self.max_context - num_tokens, total - self.max_context
        shorten = f"shorten the document by {surplus:,} tokens"
        lower = f"set max_new_tokens to {room:,} or less"
        answer = room > 0 and max_new_tokens > num_tokens
        raise FitError(
            f"the {'answer' if answer else 'prompt'} does not fit {self.name}: {num_tokens:,} "
            f"tokens + {max_new_tokens:,} for the answer = {total:,}, and its context is "
            f"{self.max_context:,}",
            lower if answer else f"{shorten} or {lower if room > 0 else 'choose another model'}",
        )

    @property
    def max_bytes(self) -> int:
        """UTF-8 bytes that no text has that fits the context: its longest tokens, one by one."""
        longest = max(len(token.encode()) for token in self.tokenizer.get_vocab())
        return self.max_context * max(longest, 16)


def load(
    name_or_path: str | None = None,
    *,
    config: HiPConfig | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> LoadedModel:
    """Loads a model for HiP attention.

    Args:
        name_or_path: a directory, a GGUF file or a hub name of a Llama, Qwen2, Qwen3, Mistral or
            Gemma checkpoint; the bundled model if None.
        config: what is pruned; the checkpoint's own settings or the defaults if None.
        dtype: of the weights; the checkpoint's own with `auto`.
        device: a torch device; a CUDA device if there is one, else the CPU.

    Raises:
        ArgumentError: there is no such model or device, or it cannot run with HiP attention.
    """
    place = check_device(device or default_device())
    name = BUNDLED if name_or_path is None else name_or_path
    path = bundled_path() if name == BUNDLED else name
    file = None if name == BUNDLED else find_gguf(name)
    if file is None:
        _check_exists(name)
    register()
    transformers_logging.disable_progress_bar()  # pyright: ignore
    try:
        settings, tokenizer, model = load_gguf(file, dtype) if file else _load(path, dtype)
    except ArgumentError:
        raise
    except (OSError, ValueError, KeyError, ImportError, IndexError) as error:
        raise _unknown(name, _first_line(error)) from error
    loaded = LoadedModel(
        model.to(place).eval(),
        tokenizer,
        name,
        int(getattr(settings, "max_position_embeddings", 0) or tokenizer.model_max_length),
        (".", "\n") if name == BUNDLED else (),
    )
    if config is not None:
        loaded.use(config)
    return loaded


def _check_exists(name: str) -> None:
    """A path that is none would be looked for on the hub."""
    if not name.strip():
        raise _unknown(name, "no name")
    if name.endswith(".gguf"):
        raise _unknown(name, "no such file")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise _unknown(name, "no such directory")


def _load(path: Path | str, dtype: torch.dtype | str) -> tuple[Any, Any, Any]:
    """Configuration, tokenizer and model of a checkpoint."""
    settings = AutoConfig.from_pretrained(path)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "hip"}
    model = AutoModelForCausalLM.from_pretrained(path, config=settings, **options)
    return settings, AutoTokenizer.from_pretrained(path), model


def _check_text(content: str) -> None:
    try:
        content.encode()
    except UnicodeEncodeError as error:
        got = f"{content[error.start : error.end]!a} at character {error.start:,}"
        raise ArgumentError("content", "text that UTF-8 can encode", got) from None


def _joined(turns: list[Turn]) -> list[Turn]:
    """Neighbouring turns of one role made one: most chat templates insist on alternation."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            content = joined[-1]["content"] + "\n\n" + turn["content"]
            joined[-1] = {"role": turn["role"], "content": content}
        else:
            joined.append(turn)
    return joined


def _unknown(name: str, reason: str) -> ArgumentError:
    return ArgumentError(
        "model",
        f'"{BUNDLED}" (bundled), a directory or a hub name of a causal language model',
        f'"{name}" ({reason})',
        "check the name, or download the checkpoint first and give its directory",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
