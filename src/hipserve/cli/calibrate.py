"""`hipserve calibrate`: the cheapest configuration that holds, and when dense is preferable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hipserve.cli import options
from hipserve.cli.comparison import First, check_first, choose_length
from hipserve.cli.files import make_room, write
from hipserve.cli.numbers import counted, parse_count, parse_share
from hipserve.cli.output import result, result_json, say, show
from hipserve.cli.steps import Steps

if TYPE_CHECKING:
    from hipserve.lab import Calibration

NOT_CERTIFIED = 5
"""Exit code: nothing was written, so that nothing is served with it by mistake."""

Texts = Annotated[
    list[Path],
    typer.Option(
        parser=options.parse_path,
        metavar="FILE",
        help="Text or .jsonl files. Repeatable.",
    ),
]
MaxLoss = Annotated[
    float,
    typer.Option(
        parser=parse_share, metavar="SHARE", help="Greatest loss of likelihood: 0.5% or 0.005."
    ),
]
Confidence = Annotated[
    float,
    typer.Option(parser=parse_share, metavar="SHARE", help="Confidence of the certificate: 90%."),
]
Length = Annotated[
    int | None,
    typer.Option(
        parser=parse_count,
        metavar="TOKENS",
        help="Tokens of each document; 32k or the model's shorter context if left out.",
    ),
]


def calibrate(
    text: Texts,
    model: options.Model = None,
    max_loss: MaxLoss = 0.005,
    confidence: Confidence = 0.9,
    length: Length = None,
    first: First = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=options.parse_path,
            metavar="FILE",
            help="TOML file for --config, written if something is certified.",
        ),
    ] = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    json: options.Json = False,
) -> None:
    """Finds the cheapest configuration whose loss against dense attention holds on held-out texts.

    Half of the documents choose where to start, the other half decide (docs/calibrate.md).
    """
    base = options.make_config(config, preset)
    check_first(first, length)
    make_room("--out", out)
    from hipserve.lab import calibrate as measure
    from hipserve.lab import read_documents, rule_card

    documents = read_documents(text)
    loaded = options.load_model(model, base, device, dtype)
    length = choose_length(loaded, length)
    with Steps("measuring …") as shown:
        made = measure(
            loaded,
            documents,
            base=base,
            max_loss=max_loss,
            confidence=confidence,
            length=length,
            first=first,
            progress=lambda document, name: shown.update(f"{document} ({name})"),
        )
    for name in made.too_short:
        say(f"left out, shorter than {length:,} tokens: {name}", style="yellow")
    if made.config and out:
        write("--out", out, made.config.dumps())
        say(f"written: {out}")
    if json:
        result_json({**made.to_dict(), "card": rule_card(made)})
    else:
        show(_table(made))
        for sentence in rule_card(made):
            result(sentence)
    if not made.certified:
        raise typer.Exit(NOT_CERTIFIED)


def _table(made: Calibration) -> Table:
    counts = (
        f"{counted(len(made.choose), 'document')} to choose by, {len(made.report)} to report on"
    )
    table = Table(title=f"{made.model}, {made.length:,} tokens, {counts}")
    for heading in ("configuration", "keys", "loss, chosen by", "loss", "at most", "verdict"):
        table.add_column(heading)
    table.caption = (
        f"loss of likelihood against dense; at most: with {made.confidence:.0%} confidence"
    )
    tested = {test.name: test for test in made.walk.tested}
    for name, keys in made.keys.items():
        loss = made.walk.chosen.get(name)
        if loss is None and name not in tested:
            continue
        cells = [name, f"{keys:,.0f}", "" if loss is None else f"{loss:+.2%}"]
        if name in tested:
            test = tested[name]
            limit = "" if test.bound is None else f"{test.bound:+.2%}"
            cells += [f"{test.loss:+.2%}", limit, "holds" if test.certified else "not certified"]
        table.add_row(*cells)
    table.add_row(
        "sinks + window", "", "", f"{made.blind_loss:+.2%}", "", "" if made.caught else "not caught"
    )
    return table
