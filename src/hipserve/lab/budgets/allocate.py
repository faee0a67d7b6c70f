"""Budgets of many heads that together keep to a total: the choice with the smallest error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hipserve.errors import ArgumentError


def allocate(errors: Tensor, costs: Sequence[int], total: int) -> list[int]:
    """The option of each head, such that their errors add up to the minimum and their costs to no
    more than `total`.

    A knapsack with one choice a head, solved exactly: for every sum of costs up to `total`, the
    smallest error that the heads so far can have. Of equal errors the cheaper option is taken.

    >>> allocate(torch.tensor([[9.0, 1.0, 0.0], [4.0, 3.0, 2.0]]), [1, 2, 3], 4)
    [2, 0]

    errors: `[heads, options]`; costs: of each option, positive and ascending.

    Raises:
        ArgumentError: not even the cheapest option of every head fits.
    """
    heads = errors.shape[0]
    if heads * costs[0] > total:
        raise ArgumentError("total", f"{heads * costs[0]} or more", str(total))
    least = torch.zeros(total + 1, dtype=torch.float64)  # by the sum of costs that is allowed
    choices: list[Tensor] = []
    for own in errors.double().cpu():
        new, choice = torch.full_like(least, torch.inf), torch.zeros_like(least, dtype=torch.int16)
        for option, cost in enumerate(costs):
            with_it = torch.full_like(least, torch.inf)
            with_it[cost:] = least[: max(total + 1 - cost, 0)] + own[option]
            better = with_it < new
            new = torch.where(better, with_it, new)
            choice.masked_fill_(better, option)
        least = new
        choices.append(choice)
    chosen: list[int] = []
    for choice in reversed(choices):
        chosen.append(int(choice[total]))
        total -= costs[chosen[-1]]
    return chosen[::-1]
