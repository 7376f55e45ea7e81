"""The baselines that choose by age: keep everything, the newest, the first and the newest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.base import NO_NEEDS, Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.budgets import capped, uniform
from policies.scratch import Region


def highest(ranks: Tensor, keep: NDArray[np.int64]) -> Selection:
    """For each head the places of its ``keep`` highest ranks [1, heads, candidates], ascending.

    Equal ranks go to the earlier place. Heads that keep fewer than others have theirs first.
    """
    most = int(keep.max())
    places = ranks.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    beyond = torch.arange(most, device="cpu") >= torch.from_numpy(keep)[:, None]  # [heads, m]
    last = ranks.shape[-1]
    return Selection(places.masked_fill(beyond, last).sort(dim=-1).values)


@dataclass(frozen=True, slots=True)
class Full:
    """Every token of every scale but the last, in order. The budget does not matter."""

    name: str = "full"
    needs: Needs = NO_NEEDS

    def allocate(self, problem: Problem) -> Allocation:
        seen = np.array(problem.schedule.seen)[:, None]
        return Allocation(uniform(problem, np.repeat(seen, problem.geometry.layers, axis=1)))

    def scratch(self, sizes: StepSizes) -> list[Region]:
        return []

    def select(self, candidates: Candidates) -> Selection:
        return highest(-candidates.positions, candidates.keep)


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """The newest ``budget`` tokens of every lane (ScaleKV section 4.1 compares against it). In a
    picture these are the bottom lines of a scale.
    """

    name: str = "sliding_window"
    needs: Needs = NO_NEEDS

    def allocate(self, problem: Problem) -> Allocation:
        return capped(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        return []

    def select(self, candidates: Candidates) -> Selection:
        return highest(candidates.positions, candidates.keep)


@dataclass(frozen=True, slots=True)
class StreamingLLM:
    """The first ``sinks`` tokens and the newest ones, ``budget`` together, as kvpress's
    streaming_llm_press configures it.
    """

    sinks: int = 4
    name: str = "streaming_llm"
    needs: Needs = NO_NEEDS

    def __post_init__(self) -> None:
        if self.sinks <= 0:
            raise ValueError(f"sinks must be positive, got {self.sinks}")

    def allocate(self, problem: Problem) -> Allocation:
        if problem.budget_tokens <= self.sinks:
            raise ValueError(
                f"budget {problem.budget_tokens} leaves nothing beside {self.sinks} sinks"
            )
        return capped(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        return []

    def select(self, candidates: Candidates) -> Selection:
        positions = candidates.positions
        is_sink = (positions >= 0) & (positions < self.sinks)
        return highest(positions.masked_fill(is_sink, candidates.schedule.total), candidates.keep)
