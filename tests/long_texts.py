"""A long text of words, for tests that hide something in it."""

from __future__ import annotations

import re

import pytest

from hipserve.lab.quality.tasks import Sample

HAY = " ".join(f"word{i}" for i in range(60_000))
ONE_PLACE = ("passkey", "niah", "kv", "variables", "quote")
"""Those over several places have tests of their own (`test_lab_tasks.py`)."""
tasks = pytest.mark.parametrize("task", ONE_PLACE)


def count(sample: Sample) -> int:
    """A tokenizer of words and digits."""
    asked = sample.questions[0]
    return len(re.findall(r"\d|[^\W\d]+", sample.document + asked.question + asked.answer))
