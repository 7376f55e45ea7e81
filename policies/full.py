"""Keep everything: the uncompressed reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.base import Step, uniform
from policies.schedule import CacheGeometry, Lengths, ScaleSchedule


@dataclass(frozen=True, slots=True)
class Full:
    """Every token of every scale but the last, in order. The budget does not matter."""

    name: str = "full"
    num_queries: int = 0

    def lengths(self, schedule: ScaleSchedule, geometry: CacheGeometry, budget: int) -> Lengths:
        seen = np.array(schedule.seen)[:, None]
        return uniform(schedule, geometry, np.repeat(seen, geometry.layers, axis=1))

    def select(self, step: Step) -> NDArray[np.int64]:
        return np.arange(int(step.keep[0]))
