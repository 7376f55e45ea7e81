"""Policies whose heads differ in length, for benchmarks: what no shipped policy does, the runtime
must do as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from policies import Allocation, Candidates, Needs, Problem, Region, Selection, StepSizes
from policies.base import NO_NEEDS, WEIGHTED
from policies.recency import highest
from policies.scoring import attention_received, attention_scratch, best, best_scratch, centres_on

GRID = 2
SCORES, FOLDS = Needs(content=True), WEIGHTED
SHARES = (1.0, 0.5, 0.75, 0.25)  # of the most that a head holds, one head after another


def ragged_allocation(problem: Problem) -> Allocation:
    """Heads hold ``budget_tokens`` on average, by SHARES."""
    heads = problem.geometry.heads
    share = np.resize(np.array(SHARES), heads)
    most = np.maximum(1, (problem.budget_tokens * share / share.mean()).astype(np.int64))
    seen = np.array(problem.schedule.seen)[:, None, None]
    shape = (len(problem.schedule), problem.geometry.layers, heads)
    tokens = np.broadcast_to(np.minimum(seen, most), shape).copy()
    tokens[-1] = 0
    return Allocation(tokens)


@dataclass(frozen=True, slots=True)
class RaggedNewest:
    """The newest tokens of every head."""

    name: str = "ragged newest"
    needs: Needs = NO_NEEDS

    def allocate(self, problem: Problem) -> Allocation:
        return ragged_allocation(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        return []

    def select(self, candidates: Candidates) -> Selection:
        return highest(candidates.positions, candidates.keep)


@dataclass(frozen=True, slots=True)
class RaggedScored:
    """What gets most attention, by head."""

    name: str = "ragged scored"
    needs: Needs = SCORES

    def allocate(self, problem: Problem) -> Allocation:
        return ragged_allocation(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        return [*attention_scratch(sizes, GRID * GRID), *best_scratch(sizes)]

    def select(self, candidates: Candidates) -> Selection:
        size = candidates.schedule.sizes[candidates.scale]
        centres = centres_on(size, GRID, candidates.keys.device)
        scores = attention_received(candidates, centres)
        return Selection(best(scores, candidates.keep, candidates.scratch))


@dataclass(frozen=True, slots=True)
class RaggedFold:
    """The same, and what is not kept is folded into the kept token before it."""

    name: str = "ragged fold"
    needs: Needs = FOLDS

    def allocate(self, problem: Problem) -> Allocation:
        return ragged_allocation(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        candidates = (sizes.rows, sizes.heads, sizes.candidates + 1)
        return [
            *attention_scratch(sizes, GRID * GRID),
            *best_scratch(sizes),
            Region("ragged_into", candidates, "int64"),
            Region("ragged_ones", (sizes.rows, sizes.heads, sizes.kept), "int64"),
        ]

    def select(self, candidates: Candidates) -> Selection:
        size = candidates.schedule.sizes[candidates.scale]
        centres = centres_on(size, GRID, candidates.keys.device)
        scores = attention_received(candidates, centres)
        keep = best(scores, candidates.keep, candidates.scratch)
        into = candidates.scratch["ragged_into"].zero_()
        into.scatter_add_(2, keep, candidates.scratch["ragged_ones"].fill_(1))
        torch.cumsum(into, dim=2, out=into).sub_(1)
        return Selection(keep, into[:, :, :-1])


RAGGED = (RaggedNewest(), RaggedScored(), RaggedFold())
