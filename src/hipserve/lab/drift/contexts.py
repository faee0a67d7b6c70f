"""Where a prompt stands in a long context: alone, or behind, inside or before so much filler."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hipserve.errors import FitError
from hipserve.lab.drift.prompts import Prompt
from hipserve.models import LoadedModel
from hipserve.models.loading import Turn

BARE = "bare"
PLACES = ("behind", "inside", "before")
"""Where the prompt stands: behind the filler, in the middle of it, or before it."""
INSIDE = "Answer the question in the middle of the text above."
BEFORE = "Answer my first message."
SPARE = 8
"""Tokens by which a text may grow when it is cut and joined."""


class Contexts:
    """Prompts in filler from a text, as token ids."""

    def __init__(self, loaded: LoadedModel, text: str) -> None:
        self._loaded = loaded
        tokenizer: Any = loaded.tokenizer
        self._filler: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]

    def bare(self, prompt: Prompt) -> Tensor:
        """`[1, tokens]` of the prompt behind its system prompt."""
        return self._loaded.encode([*_system(prompt), _user(prompt.prompt)])

    def make(self, prompt: Prompt, place: str, length: int, offset: int = 0) -> Tensor:
        """`[1, tokens]`, of about `length` tokens and at most that many.

        Args:
            place: one of `PLACES`.
            offset: prompts with another one get another stretch of the filler.

        Raises:
            FitError: the filler, or `length`, is too short.
        """
        room = length - self._encode(prompt, place, "", "").shape[1] - SPARE
        if room < 2:
            raise FitError(f"a prompt does not fit {length:,} tokens", "give a longer length")
        if room > len(self._filler):
            raise FitError(
                f"the filler is too short for {length:,} tokens: it has {len(self._filler):,}",
                "give more text",
            )
        start = offset * 997 % (len(self._filler) - room + 1)
        middle, end = start + room // 2, start + room
        first, second = (
            self._loaded.tokenizer.decode(self._filler[a:b])
            for a, b in ((start, middle), (middle, end))
        )
        return self._encode(prompt, place, first, second)[:, :length]

    def _encode(self, prompt: Prompt, place: str, first: str, second: str) -> Tensor:
        return self._loaded.encode([*_system(prompt), *_turns(prompt.prompt, place, first, second)])

    def system_tokens(self, prompt: Prompt) -> int:
        """Tokens that every context of this prompt begins with: those of its system prompt."""
        if not prompt.system:
            return 0
        return self._loaded.system_tokens(prompt.system)


def _turns(prompt: str, place: str, first: str, second: str) -> list[Turn]:
    if place == "behind":
        return [_user(first + second), _user(prompt)]
    if place == "inside":
        return [_user(f"{first}\n\n{prompt}\n\n{second}"), _user(INSIDE)]
    return [_user(prompt), _user(f"{first}{second}\n\n{BEFORE}")]


def _system(prompt: Prompt) -> list[Turn]:
    return [{"role": "system", "content": prompt.system}] if prompt.system else []


def _user(content: str) -> Turn:
    return {"role": "user", "content": content}
