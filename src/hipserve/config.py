"""What a user may choose: one frozen, validated record, read from and written to TOML or JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast, get_args

from hipserve.errors import ConfigError, did_you_mean
from hipserve.presets import PRESETS
from hipserve.selectors import SELECTORS
from hipserve.selectors.tree import Representative
from hipserve.values import (
    check_choice,
    check_factor,
    check_int,
    check_table,
    factors,
    layers,
    toml,
    wrong,
)

SelectorName = Literal["tree", "bound"]
Form = Literal["toml", "json"]
Extend = Literal["none", "yarn", "stream"]
Metering = Literal["off", "sampled"]


class IndexForm(NamedTuple):
    """What an index holds of keys.

    Attributes:
        run_size: keys of the finest run with a summary; None for no summaries.
        code_bits: bits of a channel of a code; 16 for the keys themselves.
    """

    run_size: int | None = 16
    code_bits: int = 16

    def __str__(self) -> str:
        runs = "no summaries" if self.run_size is None else f"summaries of {self.run_size} keys"
        return runs if self.code_bits == 16 else f"{runs} and codes of {self.code_bits} bits"


NO_INDEX = IndexForm(run_size=None)
"""The form of an index of keys that nobody searches: none."""


@dataclass(frozen=True, slots=True)
class HiPConfig:
    """How attention is pruned. The defaults are what `docs/quality.md` measured.

    Attributes:
        budget: keys that a query block reads between the sinks and its window.
        budget_factors: one list a layer with a factor of `budget` for each of its KV heads, as some
            need many keys and others few; one factor is for all heads of a layer, an empty list
            means 1, one list is for every layer, and no list leaves it to the model, which may
            bring what was measured. A head reads at most `rerank` times `budget`.
        selector: `tree` is the paper's search (section 3): a beam over a binary tree of key-block
            ranges, each seen through one representative block. `bound` descends through
            summaries of runs of keys: a center and a radius, channel by channel.
        representative: block of a range that stands for it in the tree.
        query_block_size: query rows that share one selection.
        key_block_size: keys that are chosen together.
        query_stride: every how many rows of a query block take part in the search, counted back
            from its last row.
        bound_block_size: keys in the finest run that has a summary.
        bound_reach: a run is scored so many radii from its center, in every channel towards the
            query; 0 is the center, in which a single peak is lost.
        rerank: the bound selector keeps this many times its budget and orders it by exact scores;
            0 uses the summaries only.
        code_bits: bits of a channel of the keys' codes, which the search reads: 4 or 8, with
            summaries of 8 bits, or 16: the keys themselves.
        relative_scores: score keys relative to the maximum score that a row finds among the keys
            it reads anyway (sinks and window): rows with large norms do not outvote rows
            that have more to gain.
        share_group: one selection for all query heads of a KV head (GQA group), or one for each.
        num_sink_tokens: first keys of a sequence, always read.
        sliding_window: most recent keys of every row, itself included, always read.
        dense_layers: layers that are never pruned; a number n means the first n.
        dense_below: query blocks that end before this position read everything. None is the
            crossover: measured once on a CPU, 8,192 on a GPU.
        decode_dense_below: the same for single rows (decode), which wait for memory instead; None
            is three times `dense_below`, and without that 6,144 on a CPU and 24,576 on a GPU.
        refresh_interval: decode steps that share one selection.
        extend: beyond the trained length (docs/extend.md), `stream` sees what a row reads at
            consecutive positions, `yarn` has the engine scale all positions; `none` does nothing.
        extend_factor: with these, how many times the trained length a sequence may reach.
        trained_length: positions that the model was trained on; None is what the model says.
        meter: `sampled` estimates what rows leave unread (docs/lab.md); `off` does nothing.
        seed: of the `random` representative.
        calibration: where a certified configuration comes from (docs/calibrate.md): a table of
            plain values, kept as it is. It changes nothing, is not compared, and is dropped where
            another field is replaced.

    Raises:
        ConfigError: for any value out of range, naming the field.
    """

    budget: int = 1024
    budget_factors: tuple[tuple[float, ...], ...] = ()
    selector: SelectorName = "bound"
    representative: Representative = "middle"
    query_block_size: int = 64
    key_block_size: int = 16
    query_stride: int = 4
    bound_block_size: int = 16
    bound_reach: float = 1.0
    rerank: int = 4
    code_bits: int = 16
    relative_scores: bool = True
    share_group: bool = True
    num_sink_tokens: int = 64
    sliding_window: int = 512
    dense_layers: tuple[int, ...] = ()
    dense_below: int | None = None
    decode_dense_below: int | None = None
    refresh_interval: int = 1
    extend: Extend = "none"
    extend_factor: float = 4.0
    trained_length: int | None = None
    meter: Metering = "off"
    seed: int = 0
    calibration: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    def __new__(cls, *_: object, **values: object) -> Self:
        """Refuses the fields of earlier versions by name, which `__init__` cannot."""
        for name in values.keys() & _GONE.keys():
            raise _unknown(name, values[name])
        return object.__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", layers(self.dense_layers))
        object.__setattr__(self, "budget_factors", factors(self.budget_factors))
        for name, low in _LEAST.items():
            check_int(name, getattr(self, name), low)
        for name, low in (("dense_below", 0), ("decode_dense_below", 0), ("trained_length", 1)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low)
        check_choice("extend", self.extend, get_args(Extend))
        check_factor("extend_factor", self.extend_factor)
        check_choice("meter", self.meter, ("off",) if self.streams else get_args(Metering))
        check_choice("selector", self.selector, tuple(SELECTORS), _GONE.get(self.selector, ""))
        for selector in SELECTORS.values():
            selector.of(self)  # checks its own options, whichever is chosen
        for name in ("share_group", "relative_scores"):
            if not isinstance(getattr(self, name), bool):
                raise wrong(name, "true or false", getattr(self, name))
        check_int("code_bits", self.code_bits, 4)
        if self.code_bits not in CODE_BITS:
            raise wrong(
                "code_bits", "4, 8 or 16", self.code_bits, "16 searches the keys themselves"
            )
        check_table("calibration", self.calibration)
        self._check_sizes()

    def _check_sizes(self) -> None:
        if self.run_size is not None and self.run_size % self.key_block_size:
            raise wrong(
                "bound_block_size",
                f"a multiple of key_block_size ({self.key_block_size})",
                self.bound_block_size,
                "choose sizes that divide each other",
            )
        if self.budget < self.granularity:
            raise wrong(
                "budget",
                f"one block or more ({self.granularity} keys)",
                self.budget,
                "raise budget or lower key_block_size",
            )
        for name in ("budget", "num_sink_tokens"):
            value = getattr(self, name)
            if value % self.granularity:
                nearest = round(value / self.granularity) * self.granularity
                raise wrong(
                    name,
                    f"a multiple of {self.granularity} (the largest block size)",
                    value,
                    f"use {nearest} for example",
                )
        if any(self.budget_factors) and not self.ranks_keys:
            raise wrong(
                "budget_factors",
                'none unless selector="bound" with a rerank of 1 or more',
                self.budget_factors,
                "leave them out or change selector and rerank",
            )
        if self.query_stride > self.query_block_size:
            most = f"at most query_block_size ({self.query_block_size})"
            raise wrong("query_stride", most, self.query_stride, "lower query_stride")

    @property
    def granularity(self) -> int:
        """Keys that sinks, budget and window start are aligned to."""
        return self.run_size or self.key_block_size

    @property
    def run_size(self) -> int | None:
        """Keys of the finest run that a search reads a summary of; None where it reads none."""
        return self.bound_block_size if SELECTORS[self.selector].reads_summaries else None

    @property
    def index_form(self) -> IndexForm:
        """What a search reads of the keys."""
        return IndexForm(self.run_size, self.code_bits)

    @property
    def streams(self) -> bool:
        """Rows beyond the trained length see what they read at consecutive positions."""
        return self.extend == "stream"

    @property
    def ranks_keys(self) -> bool:
        """The search orders more keys than the budget by their own scores."""
        return SELECTORS[self.selector].of(self).ranks_keys

    @property
    def max_selected(self) -> int:
        """Key blocks that one query block may choose: as many in every layer."""
        most = self.rerank if any(self.budget_factors) else 1
        return most * self.budget // self.key_block_size

    def lists_of(self, group_size: int) -> int:
        """Lists of blocks of a query block that one KV head serves, of so many query heads."""
        return 1 if self.share_group else group_size

    def of_layer(self, layer: int, heads: slice = slice(None)) -> HiPConfig:
        """What one layer does: the same, with the factors of its own KV heads, or of some of them.

        Raises:
            ConfigError: there are factors, but none for this layer.
        """
        varied = any(self.budget_factors)
        return _of_layer(self, layer, heads.start, heads.stop) if varied else self

    def head_blocks(self, num_kv_heads: int) -> tuple[int, ...]:
        """Key blocks that each KV head of a layer may choose.

        Raises:
            ConfigError: there are factors of another number of heads, or of more than one layer.
        """
        lists = self.budget_factors if any(self.budget_factors) else ((1.0,),)
        if len(lists) != 1:
            hint = "config.of_layer(i) has those of layer i"
            raise ConfigError("budget_factors", "those of one layer", f"{len(lists)} lists", hint)
        own = lists[0] * num_kv_heads if len(lists[0]) == 1 else lists[0]
        if len(own) != num_kv_heads:
            expected = f"a factor for each of {num_kv_heads} KV heads"
            hint = "hipserve lab budgets measures those of a model"
            raise ConfigError("budget_factors", expected, f"{len(own)}", hint)
        blocks = self.budget // self.key_block_size
        return tuple(min(max(round(x * blocks), 1), self.max_selected) for x in own)

    def replace(self, **changes: Any) -> HiPConfig:
        """A copy with some fields changed, which nobody calibrated; unknown names are errors."""
        if "preset" in changes:
            hint = 'HiPConfig.preset("fast", budget=2048) starts from one'
            raise ConfigError("preset", "fields to change", repr(changes["preset"]), hint)
        kept = {**self.to_dict(), "calibration": None} if changes else self.to_dict()
        return HiPConfig.from_dict({**kept, **changes})

    def pin(self, num_tokens: int) -> HiPConfig:
        """A copy whose sinks cover the first `num_tokens` tokens of a sequence or more: a system
        prompt that every row reads, however far behind."""
        sinks = -(-num_tokens // self.granularity) * self.granularity
        return self if sinks <= self.num_sink_tokens else self.replace(num_sink_tokens=sinks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as TOML and JSON hold them."""
        values = {name: getattr(self, name) for name in _FIELDS}
        if self.calibration is None:
            del values["calibration"]
        values["budget_factors"] = [list(of_layer) for of_layer in self.budget_factors]
        return {**values, "dense_layers": list(self.dense_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HiPConfig:
        """Builds a configuration; the key `preset` names a set of values to start from.

        Raises:
            ConfigError: for an unknown key or preset, or a value out of range.
        """
        if not isinstance(cast("object", values), dict):
            raise ConfigError("values", "a dict of fields", repr(values))
        values = dict(values)
        name = values.pop("preset", "default")
        check_choice("preset", name, tuple(PRESETS))
        for key in values:
            if key not in _FIELDS:
                raise _unknown(key, values[key])
        return cls(**{**PRESETS[name], **values})

    @classmethod
    def preset(cls, name: str, **changes: Any) -> HiPConfig:
        """`default`; `fast` and `accurate`, with a cheaper and a more exact search (docs/quality.md
        measures all three); or `paper`: arXiv 2406.09827 (its appendix).
        """
        return cls.from_dict({"preset": name, **changes})

    @classmethod
    def load(cls, path: str | Path) -> HiPConfig:
        """Reads a `.toml` or `.json` file."""
        path = Path(path)
        if path.suffix.lower() in (".yaml", ".yml"):
            raise ConfigError("config", "a TOML or JSON file", str(path))
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("config", "a readable file", f"{path} ({error})") from error
        return cls.loads(
            text, "toml" if path.suffix.lower() == ".toml" else "json", source=str(path)
        )

    @classmethod
    def loads(cls, text: str, form: Form = "json", *, source: str = "text") -> HiPConfig:
        """Reads TOML or JSON text; `source` names it in errors."""
        try:
            values = tomllib.loads(text) if form == "toml" else json.loads(text)
        except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
            raise ConfigError("config", f"valid {form}", f"{source}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError("config", "a table of keys", type(values).__name__)
        return cls.from_dict(cast("dict[str, Any]", values))

    def dumps(self, form: Form = "toml") -> str:
        """The text that `load` reads back."""
        if form == "json":
            return json.dumps(self.to_dict(), indent=2) + "\n"
        values = self.to_dict()
        table = values.pop("calibration", None)
        return toml(values) + (f"\n[calibration]\n{toml(table)}" if table else "")


_FIELDS = tuple(f.name for f in dataclasses.fields(HiPConfig) if f.init)

_LEAST = {
    "budget": 1,
    "query_block_size": 1,
    "key_block_size": 1,
    "query_stride": 1,
    "bound_block_size": 1,
    "num_sink_tokens": 0,
    "sliding_window": 1,
    "refresh_interval": 1,
}
CODE_BITS = (4, 8, 16)
_ONE_SELECTOR = 'a search has one selector since 0.2: use selector="bound"'
_GONE = {
    "tree+bound": f"it is gone, as {_ONE_SELECTOR}",
    "bound_share": f"it is gone, as {_ONE_SELECTOR} and leave bound_share out",
}
"""Fields, and values of fields, of earlier versions: what to use instead."""


def _unknown(key: str, value: object) -> ConfigError:
    if key in _GONE:
        return wrong(key, "a field of HiPConfig", value, _GONE[key])
    hint = did_you_mean(key, _FIELDS) or f"fields are {', '.join(_FIELDS)}"
    if isinstance(value, dict):
        hint = f"write its fields without [{key}], at the top level"
    return ConfigError(key, "a field of HiPConfig", "an unknown one", hint)


@functools.lru_cache(1024)
def _of_layer(config: HiPConfig, layer: int, begin: int | None, end: int | None) -> HiPConfig:
    lists = config.budget_factors
    if len(lists) > 1 and layer >= len(lists):
        hint = "hipserve lab budgets measures those of a model"
        expected = f"a list for each layer, {layer + 1} or more"
        raise ConfigError("budget_factors", expected, f"{len(lists)} lists", hint)
    own = lists[layer % len(lists)] or (1.0,)
    return dataclasses.replace(config, budget_factors=(own if len(own) == 1 else own[begin:end],))


DEFAULT = HiPConfig()
"""What operations take where no configuration is given."""
