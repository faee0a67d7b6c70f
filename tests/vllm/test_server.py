"""`hipserve serve`, as its users meet it."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import get, post, serving, stream

from hipserve.cli.ready import QUESTION
from hipserve.lab.prompts import english
from hipserve.lab.quality.tasks import pass_key
from hipserve.lab.speed.load import Leftover, cancel_half, leftover, make_cases, run_mixed
from hipserve.lab.text import language_reference
from hipserve.models import bundled_path
from hipserve.serving.address import free_port
from hipserve.serving.command_line import Server

pytest.importorskip("vllm")

KEY = pass_key("83724")


class Running:
    """A server, where it is, and what it has printed."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process, self.log, self.port = process, log, port
        self.url = f"http://127.0.0.1:{port}"

    def chat(self, *contents: str, **options: Any) -> tuple[int, dict[str, Any]]:
        messages = [{"role": "user", "content": content} for content in contents]
        body = {"model": "acorn", "messages": messages, "temperature": 0, "max_tokens": 24}
        return self.ask({**body, **options})

    def ask(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return post(f"{self.url}/v1/chat/completions", body)

    def stream(self, content: str, **options: Any) -> Iterator[dict[str, Any]]:
        body = {"model": "acorn", "messages": [{"role": "user", "content": content}]}
        return stream(f"{self.url}/v1/chat/completions", {**body, **options})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    flags = ("--kv-cache-memory-bytes", str(1 << 28), "--max-model-len", "8192")
    with serving(*flags, port=port, log=log) as process:
        yield Running(process, port, log)


def test_ready_card(server: Running) -> None:
    card = server.log.read_text()
    assert f"address      {server.url}/v1, model acorn" in card
    assert "context      8,192 tokens" in card
    assert "1,024 keys a query block" in card
    assert "index        " in card
    assert "19.5% of the full context" in card
    assert f"metrics      {server.url}/metrics" in card
    (body,) = re.findall(r"^try +curl http.* -d '(.*)'$", card, re.M)
    status, answer = server.ask(json.loads(body))
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "The pass key is 83724."


def test_a_request_that_does_not_say_how_gets_the_likeliest_tokens(server: Running) -> None:
    """Of the bundled model, and not as many as the context holds: it seldom ends its turn."""
    endless = {"role": "user", "content": "Once upon a time"}
    answers = [
        server.ask({"model": "acorn", "messages": [message]})[1]
        for message in (QUESTION, QUESTION, endless)
    ]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[:2] == ["The pass key is 83724."] * 2
    assert answers[2]["usage"]["completion_tokens"] <= 256


def test_a_start_is_never_silent(server: Running) -> None:
    told = [line for line in server.log.read_text().splitlines() if " … " in line]
    seconds = [int(line.rsplit(" ", 2)[1]) for line in told]
    assert all(b - a <= 3 for a, b in itertools.pairwise(seconds)), told


def test_answers_from_a_long_document_with_pruned_attention(server: Running) -> None:
    text = language_reference()[:22_000]
    document = f"Read the text.\n\n{text[:9000]}\n{KEY}\n{text[9000:]}"
    status, answer = server.chat(document, "What is the pass key?")
    assert status == 200
    assert answer["usage"]["prompt_tokens"] > 5000
    assert answer["choices"][0]["message"]["content"] == "The pass key is 83724."
    metrics = get(f"{server.url}/metrics")
    values = {
        line.split(" ")[0]: float(line.split(" ")[1])
        for line in metrics.splitlines()
        if line.startswith("hipserve_")
    }
    assert 0 < values["hipserve_keys_read_total"] < values["hipserve_keys_visible_total"]
    assert values["hipserve_selection_seconds_total"] > 0
    assert values["hipserve_attention_seconds_total"] > 0
    assert values["hipserve_refreshes_total"] == 0  # lone rows are dense at this length
    assert values["hipserve_page_bound_bytes"] > 0
    assert values['hipserve_dense_query_blocks_total{reason="short"}'] > 0
    assert "vllm:request_success_total" in metrics


def test_a_prompt_over_the_limit_is_refused_with_the_sum(server: Running) -> None:
    status, answer = server.chat("word " * 9000)
    assert status == 400
    assert "8192" in answer["error"]["message"]
    status, answer = server.chat("Hello", max_tokens=9000)
    assert status == 400
    assert "9000" in answer["error"]["message"]


def test_a_prompt_of_exactly_the_limit_is_refused_with_the_numbers(server: Running) -> None:
    body = {"model": "acorn", "prompt": [300] * 8192, "max_tokens": 1}
    status, answer = post(f"{server.url}/v1/completions", body)
    assert status == 400
    assert "8192 tokens, which is all of the maximum context" in answer["error"]["message"]


def test_an_answer_has_the_form_of_its_schema(server: Running) -> None:
    """An enumeration: the small model would go on with spaces inside braces."""
    schema = {"enum": ["north", "south"]}
    form = {"type": "json_schema", "json_schema": {"name": "direction", "schema": schema}}
    status, answer = server.chat("Where to?", response_format=form)
    assert status == 200, answer
    assert json.loads(answer["choices"][0]["message"]["content"]) in schema["enum"]


def test_a_long_prompt_with_a_seed_leaves_the_server_running(server: Running) -> None:
    """Read in several chunks; vLLM's engine ended after the first."""
    body = {"model": "acorn", "prompt": list(range(300, 5300)), "max_tokens": 8}
    url, sampled = f"{server.url}/v1/completions", {"seed": 7, "temperature": 1}
    answers = [post(url, {**body, **sampled}) for _ in range(2)]
    assert [status for status, _ in answers] == [200, 200]
    first, again = (answer["choices"][0]["text"] for _, answer in answers)
    assert first == again


def test_the_documented_client_finds_the_pass_key(server: Running, tmp_path: Path) -> None:
    """The program in docs/serving.md, word for word, beside a book of its own."""
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    (program,) = re.findall(r"```python\n(from openai.*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "book.txt").write_text(f"{'A quiet afternoon. ' * 200}\n{KEY}\n")
    program = program.replace("http://127.0.0.1:8000", server.url)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "The pass key is 83724.\n", done.stderr


def test_many_clients_get_their_own_answers_and_leave_nothing_behind(server: Running) -> None:
    model = str(bundled_path())
    engine = Server(model, "acorn", None, port=server.port)
    cases = make_cases(english(model), 48, 2048)
    outcome = run_mixed(engine, cases, clients=16, checks=0)
    assert outcome.lost == 0
    assert outcome.mixed_up == 0
    assert outcome.found >= 0.9 * outcome.hidden > 0
    assert cancel_half(engine, cases, clients=16) == 0
    assert leftover(engine) == Leftover(running=0, waiting=0, kv_usage=0)


def test_stopping_lets_requests_end(server: Running) -> None:
    options = {"max_tokens": 150, "ignore_eos": True, "stream_options": {"include_usage": True}}
    chunks = server.stream("Tell me.", **options)
    next(chunks)
    server.process.send_signal(signal.SIGTERM)
    *_, last = chunks
    assert last["usage"]["completion_tokens"] == 150
    assert server.process.wait(60) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "host: expected 127.0.0.1, or an API key"),
        (["--trust-remote-code"], "--trust-remote-code: expected no code from checkpoints"),
        (["--trust_remote_code=true"], "--trust-remote-code: expected no code"),
        (["--selector", "best"], "selector: expected one of"),
        (["--additional-config", "{}"], "--additional-config: expected HiP attention"),
    ],
)
def test_refusals(flags: list[str], said: str) -> None:
    command = [sys.executable, "-m", "hipserve", "serve", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr.replace("\n", " ")
