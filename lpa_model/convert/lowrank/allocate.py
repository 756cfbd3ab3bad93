"""A rank, or none, for every matrix out of one budget. It knows costs and errors, not of what they are.

Errors of different matrices are taken to add up, so only their scale to one another matters.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from lpa_model.config import Rank

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Option:
    """A way to store a matrix: at a rank, or dense (None), what it costs of the budget and what error it makes."""

    rank: Rank
    cost: int
    error: float


def allocate(curves: Mapping[Key, Sequence[Option]], budget: int) -> dict[Key, Option]:
    """An option for every matrix, of about the least total error whose total cost is within the budget.

    Greedy by error taken away per cost, along the lower convex hull of every curve: of all totals that end at a corner
    of a hull none is better. What is left over is spent on single steps that fit.

    Raises:
        ValueError: even the cheapest options cost more than the budget; the message has both numbers.
    """
    hulls = {key: hull(options) for key, options in curves.items()}
    chosen = {key: corners[0] for key, corners in hulls.items()}
    left = budget - sum(option.cost for option in chosen.values())
    if left < 0:
        raise ValueError(f"the least that factors take is {budget - left:,}, more than the {budget:,} of the budget")
    edges = [(key, a, b) for key, corners in hulls.items() for a, b in pairwise(corners)]
    for key, a, b in sorted(edges, key=lambda edge: _slope(edge[1], edge[2])):
        if chosen[key] is a and b.cost - a.cost <= left:
            chosen[key] = b
            left -= b.cost - a.cost
    while True:
        steps = [
            (_slope(chosen[key], option), index, key, option)
            for index, (key, options) in enumerate(curves.items())
            for option in options
            if 0 < option.cost - chosen[key].cost <= left and option.error < chosen[key].error
        ]
        if not steps:
            return chosen
        _, _, key, option = min(steps, key=lambda step: step[:2])
        left -= option.cost - chosen[key].cost
        chosen[key] = option


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of (cost, error) from the cheapest option to the one of least error."""
    corners: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.error)):
        if corners and option.error >= corners[-1].error:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], option):
            corners.pop()
        corners.append(option)
    return corners


def _slope(a: Option, b: Option) -> float:
    """Change of error per cost; the most negative is the best."""
    return (b.error - a.error) / (b.cost - a.cost)


def parameter_options(
    sizes: tuple[int, int], errors: Sequence[float], multiple: int, scale: float = 1.0
) -> list[Option]:
    """Those of a matrix of `sizes` (in, out) by its numbers: multiples of `multiple` that pay, and dense.

    `errors`: at every rank from 0 to the shorter side.
    """
    width_in, width_out = sizes
    dense = Option(None, width_in * width_out, 0.0)
    ranks = range(multiple, len(errors), multiple)
    return [
        *(
            Option(r, r * (width_in + width_out), scale * errors[r])
            for r in ranks
            if r * (width_in + width_out) < dense.cost
        ),
        dense,
    ]


def cache_options(width: int, errors: Sequence[float], multiple: int, scale: float = 1.0) -> list[Option]:
    """Those of the value projection of a layer by cached numbers per token: a latent that is narrower, or `width`."""
    ranks = range(multiple, min(width, len(errors)), multiple)
    return [*(Option(r, r, scale * errors[r]) for r in ranks), Option(None, width, 0.0)]
