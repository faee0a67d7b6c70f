"""The search of the paper (arXiv 2406.09827, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from hipserve.selectors.selector import Selector
from hipserve.values import check_choice, check_int

Representative = Literal["middle", "first", "last", "random"]


@dataclass(frozen=True, slots=True)
class Tree(Selector):
    """A beam over a binary tree of ranges of key blocks, each scored by one block in it.

    Attributes:
        representative: the block that stands for a range.
        seed: of the `random` representative.
    """

    name: ClassVar[str] = "tree"
    representative: Representative
    seed: int

    def __post_init__(self) -> None:
        check_choice("representative", self.representative, get_args(Representative))
        check_int("seed", self.seed, 0)
