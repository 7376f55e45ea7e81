"""What a generation holds over its life, as admission sees it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from kvruntime.planning.demand import Plan

_LEVELS = 32  # that pages are told apart in


@dataclass(frozen=True)
class Demand:
    """Pages of one generation, leg by leg. A leg is a run of steps that need about as many; between
    two legs a generation may be made to wait.

    first_step: the step (scale * layers + layer) that each leg begins with; the first is 0.
    pages: most that are held while it runs. after: held at its end; 0 after the last.
    work: tokens that go through a layer in it: how long it takes, in the proportions known before
        anything was measured.
    """

    first_step: tuple[int, ...]
    pages: tuple[int, ...]
    after: tuple[int, ...]
    work: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.pages)

    @cached_property
    def peak_left(self) -> tuple[int, ...]:
        """Most pages from the beginning of each leg on."""
        return tuple(accumulate(reversed(self.pages), max))[::-1]

    @property
    def peak(self) -> int:
        return max(self.pages)


def demand_of(plan: Plan) -> Demand:
    """The legs of a planned generation: runs of steps in the same 32nd of the peak. O(steps)."""
    layers = plan.geometry.layers
    held = plan.occupancy.within.ravel()  # rows that go have gone before
    level = -(-held * _LEVELS // max(1, int(held.max())))
    first = np.flatnonzero(np.diff(level, prepend=-1))
    last = np.append(first[1:], held.size) - 1
    work = np.repeat(plan.rows_by_scale, layers) * np.repeat(plan.schedule.tokens, layers)
    after = plan.occupancy.after.ravel()[last]
    after[-1] = 0
    return Demand(
        tuple(first.tolist()),
        tuple(np.maximum.reduceat(held, first).tolist()),
        tuple(after.tolist()),
        tuple(np.add.reduceat(work, first).tolist()),
    )


def never_waiting(demand: Demand, done: int = 0) -> Demand:
    """The same legs, of which ``done`` are over, but holding from now on whatever will be needed
    yet: a generation that may not be made to wait.
    """
    left = demand.peak_left[done:]
    before = (0,) * done
    return Demand(demand.first_step, (*before, *left), (*before, *left[1:], 0), demand.work)
