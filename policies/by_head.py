"""Centroids where they help most: heads of a layer share its budget by the error that folding makes
in each, which calibration has measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.base import Allocation, Problem
from policies.budgets import capped
from policies.centroid import Centroid
from policies.profile import Profile
from policies.schedule import Lengths

_LEAST_UNIT, _MOST_UNIT = 8, 64  # tokens; whole pages of any page size that the planner likes
_LEAST_ERROR = 1e-12  # whose logarithm is still finite


@dataclass(frozen=True, slots=True, eq=False)
class FoldErrors:
    """errors [budgets, scales, layers, heads]: squared error of attention at a scale where each
    lane was folded to ``tokens[budget]`` centroids before, over the squares of its layer.
    """

    tokens: tuple[int, ...]
    errors: NDArray[np.float64]

    def at(self, tokens: NDArray[np.int64], scale: int) -> NDArray[np.float64]:
        """The errors at so many tokens, [layers, heads, tokens]: between measured budgets, and
        beyond them, a power law.
        """
        x, given = np.log(self.tokens), np.log(tokens)
        y = np.log(np.maximum(self.errors[:, scale], _LEAST_ERROR))
        slopes = np.diff(y, axis=0) / np.diff(x)[:, None, None]
        piece = np.clip(np.searchsorted(x, given) - 1, 0, len(x) - 2)
        logs = y[piece] + slopes[piece] * (given - x[piece])[:, None, None]
        return np.moveaxis(np.exp(logs), 0, -1)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CentroidByHead(Centroid):
    """``Centroid``, with as many centroids in a layer, but not as many in each of its heads, and a
    window of twice as many queries.

    A layer's tokens are given out in units of 8 to 64, whole pages, at most a fifth of the budget:
    each to the head whose error of the next scale's attention it lowers most, at every scale anew.
    Below 40 tokens all heads get the same. Layers are not compared with each other: an error of
    attention matters more in some than in others, by how much only the picture tells.
    """

    errors: FoldErrors
    queries: int = 128
    name: str = "centroid_by_head"

    def allocate(self, problem: Problem) -> Allocation:
        Centroid.allocate(self, problem)  # raises for what does not fit
        geometry = problem.geometry
        wanted = (len(problem.schedule), geometry.layers, geometry.heads)
        if self.errors.errors.shape[1:] != wanted:
            raise ValueError(
                f"{self.name} was made for {self.errors.errors.shape[1:]}, the model is {wanted}"
            )
        even, unit = capped(problem), unit_of(problem.budget_tokens)
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
    for scale in range(1, len(schedule) - 1):
        if schedule.seen[scale] <= problem.budget_tokens:
            continue
        room = (lengths[scale - 1] + schedule.tokens[scale]) // unit  # units of each head
        steps = np.arange(1, int(room.max()) + 1)
        found = errors.at(steps * unit, scale + 1)
        saved = np.full(found.shape, np.inf)  # nobody goes without
        saved[:, :, 1:] = -np.diff(found)
        saved = np.minimum.accumulate(saved, axis=2)  # the next unit never saves more than the last
        saved[steps > room[:, :, None]] = -np.inf
        by_layer = saved.reshape(geometry.layers, -1)
        best = np.argsort(-by_layer, axis=1, kind="stable")[:, :given]
        taken = np.zeros(by_layer.shape, dtype=bool)
        np.put_along_axis(taken, best, True, axis=1)
        taken &= by_layer > -np.inf
        lengths[scale] = unit * taken.reshape(found.shape).sum(axis=2)
    return lengths


def centroid_by_head_from(profile: Profile | None) -> CentroidByHead:
    """Raises ValueError without a profile that has the errors of folding."""
    if profile is None or not profile.fold_errors:
        raise ValueError(
            "centroid_by_head needs a profile with the errors of folding: calibrate() makes one"
        )
    return CentroidByHead(
        query_means=np.array(profile.query_means, dtype=np.float32),
        errors=FoldErrors(profile.fold_tokens, np.array(profile.fold_errors)),
    )
