"""The descent through summaries of runs of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hipserve.selectors.selector import Selector
from hipserve.values import check_fraction, check_int


@dataclass(frozen=True, slots=True)
class Bound(Selector):
    """Coarse runs first, then the fine ones inside, then the keys of those that are kept.

    Attributes:
        bound_reach: a run is scored so many radii from its center.
        rerank: this many times the budget is kept and ordered by exact scores; 0 trusts the
            summaries alone.
    """

    name: ClassVar[str] = "bound"
    reads_summaries: ClassVar[bool] = True
    bound_reach: float
    rerank: int

    def __post_init__(self) -> None:
        check_fraction("bound_reach", self.bound_reach)
        check_int("rerank", self.rerank, 0)

    @property
    def ranks_keys(self) -> bool:
        return self.rerank > 0
