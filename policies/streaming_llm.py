"""Baseline: the first tokens and the newest (StreamingLLM, as kvpress's streaming_llm_press
configures it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.base import Step
from policies.schedule import CacheGeometry, Lengths, ScaleSchedule
from policies.sliding_window import capped


@dataclass(frozen=True, slots=True)
class StreamingLLM:
    """The first ``sinks`` tokens and the newest ones, ``budget`` together."""

    sinks: int = 4
    name: str = "streaming_llm"
    num_queries: int = 0

    def __post_init__(self) -> None:
        if self.sinks <= 0:
            raise ValueError(f"sinks must be positive, got {self.sinks}")

    def lengths(self, schedule: ScaleSchedule, geometry: CacheGeometry, budget: int) -> Lengths:
        if budget <= self.sinks:
            raise ValueError(f"budget {budget} leaves nothing beside {self.sinks} sinks")
        return capped(schedule, geometry, budget)

    def select(self, step: Step) -> NDArray[np.int64]:
        age = np.where(step.tokens < self.sinks, -1, step.tokens.max() - step.tokens)
        return np.sort(np.argsort(age, kind="stable")[: int(step.keep[0])])
