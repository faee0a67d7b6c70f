"""What is said around answers: empty ones, lines that are no text, short texts. No model runs."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hipserve.cli import chat, demo
from hipserve.cli.demo import Reading
from hipserve.cli.run import ask


class Talk:
    """A conversation whose model gives one answer."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def ask(self, _question: str, *, on_text: Any = None, **_: Any) -> str:
        if on_text and self.answer:
            on_text(self.answer)
        return self.answer


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("answer", ["", "\n", "Yes."])
def test_an_empty_answer_is_explained(
    answer: str, stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    talk: Any = Talk(answer)
    ask(talk, "Who?", stream=stream)
    said = "the answer is empty: the model ended its turn at once" in capsys.readouterr().err
    assert said == (not answer.strip())


def test_a_line_that_is_no_text_does_not_end_a_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"one\n\xff\xfe\ntwo\n\nthree\n"), "utf-8")
    stream.reconfigure(errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stream)
    assert list(chat._questions()) == ["one", "two"]
    assert "error: question: expected UTF-8 text" in capsys.readouterr().err


def test_the_demo_compares_short_texts_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No length is negative, whatever the text has."""
    lengths: list[int] = []

    def read(loaded: Any, config: Any, text: str, length: int, *_: Any, **__: Any) -> Reading:
        lengths.append(length)
        statistics: Any = SimpleNamespace(prompt_tokens=212)
        return Reading([{"right": True, "answer": "1"}] * 4, [statistics])

    def instead(value: Any) -> Any:
        return lambda *_: value  # pyright: ignore

    loaded = SimpleNamespace(name="acorn", backend="cpu", max_context=131072, use=instead(None))
    monkeypatch.setattr(demo.options, "load_model", instead(loaded))
    monkeypatch.setattr(demo, "_read", read)
    monkeypatch.setattr(demo, "_summary", instead(""))
    monkeypatch.setattr(demo, "_ratios", instead(""))
    measured = {"first_token_seconds": 1.0, "decode_tokens_per_second": 1.0}
    monkeypatch.setattr(demo, "_measured", instead(measured))
    demo.demo(dense_length=2048, length=66 * 1024)
    assert lengths == [66 * 1024, 2048, 2048]
    assert "one question about some 212 tokens" in capsys.readouterr().err
