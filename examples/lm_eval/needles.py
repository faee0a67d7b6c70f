"""Eight numbers hidden in the Python language reference, and a question about one of them.

Nothing is downloaded: `hipserve.lab` makes documents of as many tokens as `--metadata` says.
"""

from __future__ import annotations

from typing import Any

import datasets
from transformers import AutoTokenizer

from hipserve.lab import make_sample, read_documents


def needles(
    pretrained: str, length: int = 4096, documents: int = 8, **_: Any
) -> dict[str, datasets.Dataset]:
    """The test split; `pretrained` comes from `--model_args`, the others from `--metadata`."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    text = read_documents()[0].text

    def count(sample: Any) -> int:
        asked = sample.questions[0]
        return len(tokenizer(f"{sample.document}{asked.question}{asked.answer}")["input_ids"])

    rows: list[dict[str, str]] = []
    for seed in range(documents):
        sample = make_sample("niah", text, length, count, seed)
        asked = sample.questions[0]
        begun, value = asked.answer.rsplit(" ", 1)
        prompt = f"{sample.document}\n\n{asked.question}"
        rows.append({"prompt": prompt, "begun": begun, "value": f" {value}"})
    return {"test": datasets.Dataset.from_list(rows)}
