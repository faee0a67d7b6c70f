"""What the lines of vLLM's log mean: how far a start has come, and why one failed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hipserve.errors import ArgumentError, BackendError, FitError, HipserveError

STAGES = (
    ("Platform plugin", "vLLM is reading its configuration"),
    ("Starting to load model", "loading the model"),
    ("Loading weights took", "the model is loaded"),
    ("KV cache size", "laying out the KV cache"),
    ("Warming up model", "compiling the model"),
    ("init engine", "the engine runs"),
    ("Starting vLLM server", "opening the address"),
)
"""What vLLM's log lines say about the progress of a start."""

USAGE = ("Value error, ", ": error: ")
"""Marks of lines in which vLLM refuses an option."""

OWN = r"([\w-]+): expected (.+?), got (.+?)(?:; (.+))?"
"""A sentence in which hipserve refuses an option: ArgumentError made it."""


UNREACHED = (
    r"(?i)name or service not known|name resolution|max retries exceeded|couldn't connect to|"
    r"repository not found|invalid repository id|not a (local folder|valid model identifier)|"
    r"outgoing traffic has been disabled"
)
"""What vLLM and the hub's client say of a model that is neither here nor to be fetched."""


def stage_of(line: str) -> str | None:
    """What a line of vLLM's log says about the start, if anything."""
    return next((stage for mark, stage in STAGES if mark in line), None)


def complaint(lines: Iterable[str]) -> str:
    """The sentence that says why a server ended."""
    text = [re.sub(r"^(\[\w+\]: )?(\(.*?\) )?(ERROR [\d: -]+\[.*?\] )?", "", x) for x in lines]
    errors = [x.strip() for x in text if re.match(r"\s*[\w.]*(Error|Exception)\b.*: ", x)]
    ours = [x for x in errors if x.startswith("hipserve.")]
    values = [x.strip().removeprefix("Value error, ") for x in text if "Value error, " in x]
    found = values or ours or errors or [x.strip() for x in text if "error:" in x]
    sentence = found[0] if found else "no reason given; see the log with --verbose"
    return re.sub(r"^[\w.]*Error: |\s*\[type=.*", "", sentence)


def refusal(sentence: str, lines: Sequence[str], model: str, on_cpu: bool) -> HipserveError:
    """The last lines of a server of this model that did not start, as an error of the command.

    vLLM advises `gpu_memory_utilization`, which is not what limits the KV cache on a CPU.
    """
    if re.search(r"memory for the cache blocks|cache is needed|even a single token", sentence):
        more = "--kv-cache-memory-bytes" if on_cpu else "--gpu-memory-utilization"
        facts = re.split(r"\.? *Try increasing", sentence)[0].rstrip(". ")
        return FitError(
            f"the server did not start: {facts}", f"raise {more} or lower --max-model-len"
        )
    if re.search(UNREACHED, sentence):
        expected = "a directory, or a name on the hub that this machine has or can fetch"
        hint = f"check the name; `hf download {model}` fetches it beforehand"
        return ArgumentError("model", expected, f"{model} ({sentence})", hint)
    if own := re.fullmatch(OWN, sentence):
        return ArgumentError(own[1], own[2], own[3], own[4] or "")
    if any(mark in line for line in lines for mark in USAGE):
        hint = "`hipserve-vllm serve --help=all` lists vLLM's flags"
        return ArgumentError("serve", "options that vLLM takes", sentence, hint)
    return BackendError(f"the server did not start: {sentence}")
