"""`hipserve lab meter`: are the meter's estimates right, and do they predict a loss?"""

from __future__ import annotations

from hipserve.cli import options
from hipserve.cli.lab_shared import (
    Length,
    Samples,
    Svg,
    Text,
    check_svg,
    read_samples,
    show_report,
)
from hipserve.cli.output import say
from hipserve.cli.steps import Steps


def meter(
    model: options.Model = None,
    length: Length = 8192,
    text: Text = None,
    samples: Samples = 1,
    seed: options.Seed = 0,
    budget: options.Budget = None,
    selector: options.Selector = None,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    svg: Svg = None,
    json: options.Json = False,
) -> None:
    """The attention that rows leave unread: what the meter says, and what all keys say.

    And whether it predicts the loss of a position, as rank correlation with KL to dense attention.
    """
    base = options.make_config(config, preset, budget, selector)
    check_svg(svg)
    from hipserve.lab.meter import charts, grids, measure_meter, sentences

    loaded = options.load_model(model, base, device, dtype)
    chosen = read_samples(loaded, text, length, samples, seed)
    with Steps("recording …") as shown:
        report = measure_meter(loaded, base, chosen, progress=shown.update)
    show_report(report.to_dict(), grids(report), charts(report), svg=svg, json=json)
    for sentence in sentences(report):
        say(sentence)
