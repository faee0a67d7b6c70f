"""Options that several commands share, and how they make a configuration and a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hipserve.capacity.shape import DTYPE_BYTES
from hipserve.cli.numbers import at_least, parse_count, parse_counts, parse_temperature
from hipserve.cli.output import err
from hipserve.config import HiPConfig
from hipserve.errors import ArgumentError, did_you_mean
from hipserve.presets import PRESETS

if TYPE_CHECKING:
    from hipserve.models import LoadedModel

DTYPES = ("auto", *DTYPE_BYTES)


def parse_path(text: str | Path) -> Path:
    """A file name; an empty one, which would be the current directory, is a mistake.

    Raises:
        typer.BadParameter: it is empty.
    """
    if not str(text).strip():
        raise typer.BadParameter("the file name is empty")
    return Path(text)


def check_model(name: str | None) -> None:
    """Before anything is loaded: a model may have this name."""
    from hipserve.models.names import check_name

    if name is not None:
        check_name(name)


def check_dtype(name: str) -> None:
    """Before anything is loaded: weights may have this type."""
    if name not in DTYPES:
        hint = did_you_mean(name, DTYPES)
        raise ArgumentError("--dtype", f"one of {', '.join(DTYPES)}", repr(name), hint)


def check_texts(files: list[Path] | None) -> None:
    """Before anything is loaded: the files of --text are there."""
    for file in files or ():
        if not str(file).startswith("@"):
            _check_file("--text", file)


def check_prompts(file: Path | None) -> None:
    """Before anything is loaded: the file of --prompts is there."""
    if file is not None:
        _check_file("--prompts", file)


def _check_file(option: str, file: Path) -> None:
    if not file.exists():
        raise ArgumentError(option, "a readable UTF-8 text file", f"{file} (no such file)")


def check_lengths(text: str) -> None:
    """Before anything is loaded: every length has a token."""
    if 0 in parse_counts(text):
        raise ArgumentError("--lengths", "1 or more tokens", "0")


def check_system(system: str, pin_system: bool) -> None:
    """Before anything is loaded: what is pinned is given."""
    if pin_system and not system:
        raise ArgumentError("--pin-system", "--system with it", "none")


CHECKS = {
    "model": check_model,
    "dtype": check_dtype,
    "text": check_texts,
    "prompts": check_prompts,
    "lengths": check_lengths,
}
"""By argument of commands; asked before they import torch."""

Budget = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="KEYS", help="Keys that a query block selects: 1k."),
]
Selector = Annotated[str | None, typer.Option(help="tree or bound.")]
Preset = Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", parser=parse_path, metavar="FILE", help="HiPConfig as TOML or JSON."),
]
CodeBits = Annotated[
    int | None,
    typer.Option(
        parser=parse_count,
        metavar="BITS",
        help="Bits of a channel of the codes that a search reads: 4, 8 or 16.",
    ),
]
Extend = Annotated[
    str | None,
    typer.Option(help="Beyond the trained length: none, yarn or stream (docs/extend.md)."),
]
ExtendFactor = Annotated[
    float | None,
    typer.Option(metavar="NUMBER", help="With it, context in trained lengths; 4 if left out."),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")]
DType = Annotated[str, typer.Option(help=f"Type of weights: {', '.join(DTYPES)}.")]
KvCacheDtype = Annotated[
    str, typer.Option(help="Type of keys and values: auto as the model computes, fp8 on a GPU.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON output.")]
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Directory, GGUF file or hub name; the bundled model if left out.",
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(parser=at_least(1), metavar="TOKENS", help="Maximum new tokens of an answer."),
]
Temperature = Annotated[
    float,
    typer.Option(
        parser=parse_temperature, metavar="NUMBER", help="Sampling temperature; 0 is greedy."
    ),
]
Meter = Annotated[
    bool,
    typer.Option("--meter", help="Estimate of the attention that pruned rows leave unread."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of samples and of generation.")]
System = Annotated[str, typer.Option(metavar="TEXT", help="System prompt, before everything else.")]
PinSystem = Annotated[
    bool,
    typer.Option("--pin-system", help="Every token reads the system prompt: sinks cover it."),
]
ControlTokens = Annotated[
    bool,
    typer.Option(
        "--allow-control-tokens",
        help="Control tokens in texts, such as <|eot_id|>, keep their meaning.",
    ),
]


def make_config(
    config: Path | None = None,
    preset: str = "default",
    budget: int | None = None,
    selector: str | None = None,
    code_bits: int | None = None,
    extend: str | None = None,
    extend_factor: float | None = None,
    meter: bool = False,
) -> HiPConfig:
    """The file or the preset, with the options on top."""
    if config and preset != "default":
        hint = f'leave --preset out, or write preset = "{preset}" into {config}'
        raise ArgumentError("preset", "a preset or a configuration file", "both", hint)
    base = HiPConfig.load(config) if config else HiPConfig.preset(preset)
    given = {"budget": budget, "selector": selector, "code_bits": code_bits}
    given |= {"extend": extend, "extend_factor": extend_factor}
    given |= {"meter": "sampled" if meter else None}
    made = base.replace(**{key: value for key, value in given.items() if value is not None})
    if extend_factor is not None and made.extend == "none":
        hint = "add --extend yarn or --extend stream"
        raise ArgumentError("--extend-factor", "--extend with it", "none", hint)
    return made


def refuse_with_dense(
    config: Path | None,
    preset: str,
    budget: int | None,
    selector: str | None,
    code_bits: int | None = None,
    meter: bool = False,
    extend: str | None = None,
) -> None:
    """Dense attention has no pruning options, and reads no more than the trained length."""
    given = {"config": config, "budget": budget, "selector": selector, "code-bits": code_bits}
    given |= {"extend": extend}
    names = [f"--{name}" for name, value in given.items() if value is not None]
    names += ["--preset"] if preset != "default" else []
    names += ["--meter"] if meter else []
    if names:
        got = ", ".join(names)
        raise ArgumentError("--dense", "no pruning options with it", got)


def load_model(name: str | None, config: HiPConfig, device: str | None, dtype: str) -> LoadedModel:
    """Loads a model; stderr shows which."""
    from hipserve.models import BUNDLED, load

    _silence()
    with err.status(f"loading {name or BUNDLED} …"):
        return load(name, config=config, dtype=dtype, device=device)


def _silence() -> None:
    """Users of a command need no log messages of libraries."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity_error()


def sampling(temperature: float, seed: int) -> dict[str, Any]:
    """Options of `generate` for a temperature."""
    if not temperature:
        return {}
    import torch

    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature}
