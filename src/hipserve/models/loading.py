"""A model by name: the bundled one without a network, or any checkpoint transformers can load."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, FitError
from hipserve.host import HostMemory
from hipserve.integrations.transformers import (
    capture_decode,
    check_model,
    extend_positions,
    register,
)
from hipserve.integrations.transformers.settings import config_of
from hipserve.models.bundled import BUNDLED, bundled_path
from hipserve.models.cores import keep_to_free_cores
from hipserve.models.gguf import load_gguf
from hipserve.models.gguf_files import find_gguf
from hipserve.models.names import check_name, unknown
from hipserve.platform import check_device, cpu_multiplies, default_device, describe_backend

Turn = dict[str, str]

WIDENED_SHARE = 0.5
"""Of the memory that is available: weights are made float32 if they then take no more."""

MARK = "\ue0f0{}\ue0f1"
"""Stands for a control token while a conversation is rendered: private-use characters around its
number."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model, its tokenizer, and what it can take.

    Attributes:
        model: the transformers model, `attn_implementation="hip"`.
        tokenizer: its tokenizer.
        name: what the user called it.
        max_context: tokens of prompt and answer together.
        stop_strings: ends of an answer, for a model that seldom ends its turn.
        control_tokens: control tokens written in a turn, such as `<|eot_id|>`, count as such.
    """

    model: Any
    tokenizer: Any
    name: str
    max_context: int
    stop_strings: tuple[str, ...] = ()
    control_tokens: bool = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def backend(self) -> str:
        """What computes attention now: a backend of ours, or dense attention of transformers."""
        name = self.model.config._attn_implementation
        if name != "hip":
            return "torch SDPA" if name == "sdpa" else "the model's own dense attention"
        return describe_backend(self.device, self.model.dtype, self.head_dim)

    @property
    def head_dim(self) -> int:
        config = self.model.config
        own = getattr(config, "head_dim", None)
        return own or config.hidden_size // config.num_attention_heads

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of a token's keys and values, were all layers to keep them."""
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        row = 2 * heads * self.head_dim * self.model.dtype.itemsize
        return config.num_hidden_layers * row

    def use(self, config: HiPConfig | None) -> None:
        """Switches to HiP attention with `config`, or with None to transformers' dense attention:
        SDPA, or the model's own code where SDPA is not the same (Gemma 2 caps its scores).

        Raises:
            ArgumentError: `config.extend` cannot be done to this model.
        """
        if config:
            register()
        extend_positions(self.model, config)
        self.model.set_attn_implementation("hip" if config else _dense(self.model))
        self.model.config.hip = config.to_dict() if config else None

    def encode(self, turns: list[Turn]) -> torch.Tensor:
        """`[1, tokens]` int64 of a conversation whose last turn is the user's, ready to answer.

        A tokenizer without a chat template gets the contents one after the other. Control tokens
        in a content are text, unless `control_tokens` is set: no document ends the user's turn.

        Raises:
            ArgumentError: a turn holds half of a surrogate pair, which no tokenizer reads.
        """
        for turn in turns:
            _check_text(turn["content"])
        marked, controls = (turns, []) if self.control_tokens else self._mark_controls(turns)
        template = self.tokenizer.chat_template
        text = self._render(marked) if template else _one_after_the_other(marked)
        if not controls:
            ids = self.tokenizer(text, add_special_tokens=not template)["input_ids"]
        else:
            ids = [] if template else self.tokenizer("")["input_ids"]
            for part in re.split(f"({MARK.format('[0-9]+')})", text):
                control = part.startswith(MARK[0]) and controls[int(part[1:-1])]
                options = {"add_special_tokens": False, "split_special_tokens": bool(control)}
                ids += self.tokenizer(control or part, **options)["input_ids"]
        return torch.tensor([ids], device=self.device)

    def system_tokens(self, system: str) -> int:
        """Tokens that every conversation with this system prompt begins with."""
        turns = [{"role": "system", "content": system}]
        one, other = (self.encode([*turns, {"role": "user", "content": x}])[0] for x in ("a", "Z"))
        size = min(len(one), len(other))
        return int((one[:size] == other[:size]).int().cumprod(0).sum())

    def _render(self, turns: list[Turn]) -> str:
        """The text of a conversation, as a server renders it; where the template refuses turns of
        one role in a row, which a server does too, they are joined."""
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        try:
            return self.tokenizer.apply_chat_template(turns, **options)
        except TemplateError:
            return self.tokenizer.apply_chat_template(_joined(turns), **options)

    def _mark_controls(self, turns: list[Turn]) -> tuple[list[Turn], list[str]]:
        """The turns with a mark for every control token in their contents, and these tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        names = {*self.tokenizer.all_special_tokens, *(t.content for t in added if t.special)}
        names.add(MARK[0])  # a text may hold even that
        pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        found: list[str] = []

        def mark(match: re.Match[str]) -> str:
            found.append(match[0])
            return MARK.format(len(found) - 1)

        marked = [{**turn, "content": re.sub(pattern, mark, turn["content"])} for turn in turns]
        return marked, found

    def check_fit(self, num_tokens: int, max_new_tokens: int) -> None:
        """Raises FitError, with the numbers, where prompt and answer exceed the context."""
        total = num_tokens + max_new_tokens
        if total <= self.max_context:
            return
        room, surplus = self.max_context - num_tokens, total - self.max_context
        shorten = f"shorten the document by {surplus:,} tokens"
        shorten += ', extend the model with extend="stream" (--extend stream)'
        lower = f"set max_new_tokens to {room:,} or less"
        answer = room > 0 and max_new_tokens > num_tokens
        raise FitError(
            f"the {'answer' if answer else 'prompt'} does not fit {self.name}: {num_tokens:,} "
            f"tokens + {max_new_tokens:,} for the answer = {total:,}, and its context is "
            f"{self.max_context:,}",
            lower if answer else f"{shorten}, or {lower if room > 0 else 'choose another model'}",
        )

    @property
    def max_bytes(self) -> int:
        """Maximum UTF-8 bytes of a text that fits the context: as many of the longest token."""
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
        dtype: of the weights; with `auto` the checkpoint's own, or float32 on a CPU that multiplies
            nothing shorter and has room for it.
        device: a torch device; a CUDA device if there is one, else the CPU.

    Raises:
        ArgumentError: there is no such model or device, or it cannot run with HiP attention.
    """
    place = check_device(device or default_device())
    name = BUNDLED if name_or_path is None else name_or_path
    path = bundled_path() if name == BUNDLED else name
    file = None if name == BUNDLED else find_gguf(name)
    if file is None:
        check_name(name)
    register()
    transformers_logging.disable_progress_bar()  # pyright: ignore
    try:
        settings, tokenizer, model = load_gguf(file, dtype) if file else _load(path, dtype)
    except ArgumentError:
        raise
    except (OSError, ValueError, KeyError, ImportError, IndexError) as error:
        raise unknown(name, _first_line(error)) from error
    trained = int(getattr(settings, "max_position_embeddings", 0) or tokenizer.model_max_length)
    model = model.to(place).eval()
    if place.type == "cpu":
        keep_to_free_cores(model)
        if dtype == "auto":
            _widen(model)
    loaded = LoadedModel(
        capture_decode(model) if place.type == "cuda" else model,
        tokenizer,
        name,
        extended_length(config or config_of(settings), trained),
        (".", "\n") if name == BUNDLED else (),
    )
    if config is not None:
        loaded.use(config)
    return loaded


def _dense(model: Any) -> str:
    """transformers' dense attention that computes what the model defines."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if model._supports_sdpa and not capped else "eager"


def extended_length(config: HiPConfig, trained_length: int) -> int:
    """Tokens that a model takes: as many as it was trained on, unless `config` extends it."""
    if config.extend == "none":
        return trained_length
    return int(config.extend_factor * (config.trained_length or trained_length))


def _load(path: Path | str, dtype: torch.dtype | str) -> tuple[Any, Any, Any]:
    """Configuration, tokenizer and model of a checkpoint."""
    settings = AutoConfig.from_pretrained(path)
    _check_class(settings)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "hip"}
    model = AutoModelForCausalLM.from_pretrained(path, config=settings, **options)
    return settings, AutoTokenizer.from_pretrained(path), model


def _widen(model: Any) -> None:
    """Makes the weights float32 where the CPU multiplies nothing shorter and memory has room."""
    if cpu_multiplies(model.dtype):
        return
    memory, needed = HostMemory.read(), model.num_parameters() * torch.float32.itemsize
    if memory is not None and needed <= memory.available * WIDENED_SHARE:
        nn.Module.float(model)  # transformers' own refuses weights that came from a GGUF file
        model.config.dtype = torch.float32


def _check_text(content: str) -> None:
    try:
        content.encode()
    except UnicodeEncodeError as error:
        got = f"{content[error.start : error.end]!a} at character {error.start:,}"
        raise ArgumentError("content", "text that UTF-8 can encode", got) from None


def _check_class(settings: Any) -> None:
    """Refuses a model that cannot run with HiP attention, before its weights are loaded."""
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(settings) in known:
        classes = known[type(settings)]
        check_model(classes[0] if isinstance(classes, tuple) else classes, settings)


def _one_after_the_other(turns: list[Turn]) -> str:
    return "\n\n".join(turn["content"] for turn in turns) + "\n\n"


def _joined(turns: list[Turn]) -> list[Turn]:
    """Neighbouring turns of one role are joined: most chat templates require alternation."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            content = joined[-1]["content"] + "\n\n" + turn["content"]
            joined[-1] = {"role": turn["role"], "content": content}
        else:
            joined.append(turn)
    return joined


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
