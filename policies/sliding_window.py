"""Baseline: the newest tokens (ScaleKV section 4.1 compares against it)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.base import Step, uniform
from policies.schedule import CacheGeometry, Lengths, ScaleSchedule


def capped(schedule: ScaleSchedule, geometry: CacheGeometry, budget: int) -> Lengths:
    """Every lane holds ``budget`` tokens once that many have been seen."""
    seen = np.minimum(np.array(schedule.seen), budget)[:, None]
    return uniform(schedule, geometry, np.repeat(seen, geometry.layers, axis=1))


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """The newest ``budget`` tokens of every lane. In a picture these are the bottom lines of a
    scale.
    """

    name: str = "sliding_window"
    num_queries: int = 0

    def lengths(self, schedule: ScaleSchedule, geometry: CacheGeometry, budget: int) -> Lengths:
        return capped(schedule, geometry, budget)

    def select(self, step: Step) -> NDArray[np.int64]:
        return np.sort(np.argsort(-step.tokens)[: int(step.keep[0])])
