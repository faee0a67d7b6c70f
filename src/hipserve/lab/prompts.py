"""Prompts of so many tokens that hide a pass key, for servers that are measured or loaded."""

from __future__ import annotations

from typing import Any

from hipserve.lab.quality.puzzle import READ
from hipserve.lab.quality.tasks import PASS_KEY_QUESTION, pass_key
from hipserve.lab.text import language_reference

KEY = "83724"


class Prompts:
    """Prompts of a given length in tokens that hide a pass key in a text."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]

    def make(self, length: int, offset: int = 0, key: str = KEY) -> list[int]:
        """`length` token ids that hide `key`; another `offset` starts elsewhere in the text."""
        needle: list[int] = self._tokenizer(f"\n{pass_key(key)}\n", add_special_tokens=False)[
            "input_ids"
        ]
        mark = "<DOCUMENT>"
        turns = [{"role": "user", "content": f"{READ}\n\n{mark}"}]
        turns.append({"role": "user", "content": PASS_KEY_QUESTION})
        frame = self._tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        before, after = (
            self._tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in frame.split(mark)
        )
        room = length - len(before) - len(after) - len(needle)
        start = offset * 997 % len(self._ids)
        source = (self._ids[start:] + self._ids) * (room // len(self._ids) + 2)
        half = room // 2
        return [*before, *source[:half], *needle, *source[half:room], *after]


def english(model: str) -> Prompts:
    """Prompts of the language reference of CPython, as a model reads it."""
    from transformers import AutoTokenizer

    return Prompts(AutoTokenizer.from_pretrained(model), language_reference())
