"""What every selector is: options, and what its search needs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Self


@dataclass(frozen=True, slots=True)
class Selector:
    """A way to find key blocks. The fields of a subclass are its options, as in `HiPConfig`, and
    its `__post_init__` checks them.

    Attributes:
        name: what `HiPConfig.selector` calls it.
        reads_summaries: it scores runs of keys by their summaries. It gets an index with summaries
            then, and sinks, budget and window starts are whole runs; without, they are whole key
            blocks.
    """

    name: ClassVar[str]
    reads_summaries: ClassVar[bool] = False

    @property
    def ranks_keys(self) -> bool:
        """It orders more keys than the budget by their own scores."""
        return False

    @classmethod
    def of(cls, config: object) -> Self:
        """With the options that a `HiPConfig` gives.

        Raises:
            ConfigError: for a value out of range, naming the field.
        """
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})
