"""Centroids where they help most: heads of a layer share its budget by the error that folding makes
in each, which calibration has measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.base import Allocation, Problem
from policies.centroid import Centroid, centroid_from
from policies.profile import Profile
from policies.schedule import Lengths

_LEAST_UNIT, _MOST_UNIT = 8, 64  # tokens
_LEAST_ERROR = 1e-12  # whose logarithm is still finite
_STEEPEST = -10.0  # power of the budget by which an error falls


@dataclass(frozen=True, slots=True, eq=False)
class FoldErrors:
    """errors [budgets, scales, layers, heads]: squared error of attention at a scale where each
    lane was folded to ``tokens[budget]`` centroids before, over the squares of its layer. Raises
    ValueError for less than two budgets, or such as do not ascend.
    """

    tokens: tuple[int, ...]
    errors: NDArray[np.float64]

    def __post_init__(self) -> None:
        tokens, shape = self.tokens, self.errors.shape
        if len(tokens) < 2 or list(tokens) != sorted(set(tokens)) or tokens[0] < 1:
            raise ValueError(f"tokens must be two budgets or more, ascending, got {tokens}")
        if len(shape) != 4 or shape[0] != len(tokens):
            raise ValueError(
                f"errors must be [{len(tokens)}, scales, layers, heads], got {list(shape)}"
            )

    def at(self, tokens: NDArray[np.int64], scale: int) -> NDArray[np.float64]:
        """The errors at so many tokens, [layers, heads, tokens], convex and falling: between what
        the lower hull of the measured ones keeps, and beyond, a power law.
        """
        x, given = np.log(self.tokens), np.log(tokens)
        y = np.log(np.maximum(self.errors[:, scale], _LEAST_ERROR))
        y = _lower_hull(x, np.minimum.accumulate(y))
        slopes = np.clip(np.diff(y, axis=0) / np.diff(x)[:, None, None], _STEEPEST, 0.0)
        piece = np.clip(np.searchsorted(x, given) - 1, 0, len(x) - 2)
        logs = y[piece] + slopes[piece] * (given - x[piece])[:, None, None]
        return np.moveaxis(np.exp(logs), 0, -1)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CentroidByHead(Centroid):
    """``Centroid``, with as many centroids in a layer, but not as many in each of its heads, and a
    window of twice as many queries.

    A layer's tokens are given out in units of 8, 16, 32 or 64, at most a fifth of the budget: each
    to the head whose error of the next scale's attention it lowers most, at every scale anew. Below
    40 tokens all heads get the same. Units are whole pages where the planner chooses the page size,
    as it does for a budget in bytes; other pages are filled in part, and there are more of them.

    Layers are not compared with each other: an error of attention matters more in some than in
    others, by how much only the picture tells.
    """

    errors: FoldErrors
    queries: int = 128
    name: str = "centroid_by_head"

    def allocate(self, problem: Problem) -> Allocation:
        even, geometry = Centroid.allocate(self, problem), problem.geometry
        measured = self.errors.errors.shape[1:]
        if measured != (len(problem.schedule), geometry.layers, geometry.heads):
            raise ValueError(
                f"{self.name}: errors of {measured} scales, layers and heads, the model has "
                f"{(len(problem.schedule), geometry.layers, geometry.heads)}: calibrate it"
            )
        unit = unit_of(problem.budget_tokens)
        return Allocation(_shared(problem, self.errors, even.tokens, unit)) if unit else even


def unit_of(budget: int) -> int:
    """Tokens that are given out at a time, a power of two; 0 where heads are to be alike."""
    unit = _MOST_UNIT
    while unit * 5 > budget:
        unit //= 2
    return unit if unit >= _LEAST_UNIT else 0


def _shared(problem: Problem, errors: FoldErrors, even: Lengths, unit: int) -> Lengths:
    """Lengths [scales, layers, heads] in units, once more is seen than the budget."""
    schedule, geometry = problem.schedule, problem.geometry
    lengths, given = even.copy(), geometry.heads * problem.budget_tokens // unit
    for scale in range(len(schedule) - 1):
        if schedule.seen[scale] <= problem.budget_tokens:
            continue
        before = lengths[scale - 1]  # of scale 0 those after the last one, none
        room = (before + schedule.tokens[scale]) // unit  # units of each head
        steps = np.arange(1, int(room.max()) + 1)
        found = errors.at(steps * unit, scale + 1)
        saved = np.full(found.shape, np.inf)  # nobody goes without
        saved[:, :, 1:] = -np.diff(found)
        saved[steps > room[:, :, None]] = -np.inf
        by_unit = saved.swapaxes(1, 2).reshape(geometry.layers, -1)  # equal ones by turns
        best = np.argsort(-by_unit, axis=1, kind="stable")[:, :given]
        taken = np.zeros(by_unit.shape, dtype=bool)
        np.put_along_axis(taken, best, True, axis=1)
        taken &= by_unit > -np.inf
        lengths[scale] = unit * taken.reshape(geometry.layers, -1, geometry.heads).sum(axis=1)
    return lengths


def _lower_hull(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The greatest convex function of x [n] that is nowhere above y [n, ...]. O(n^3), for few."""
    hull = y.copy()
    for middle in range(1, len(x) - 1):
        for left in range(middle):
            for right in range(middle + 1, len(x)):
                share = (x[middle] - x[left]) / (x[right] - x[left])
                chord = (1 - share) * y[left] + share * y[right]
                np.minimum(hull[middle], chord, out=hull[middle])
    return hull


def centroid_by_head_from(profile: Profile | None) -> CentroidByHead:
    """Raises ValueError without a profile that has the errors of folding."""
    if profile is None or not profile.fold_errors:
        raise ValueError(
            "centroid_by_head needs a profile with the errors of folding: calibrate() makes one"
        )
    return CentroidByHead(
        query_means=centroid_from(profile).query_means,
        errors=FoldErrors(profile.fold_tokens, np.array(profile.fold_errors)),
    )
