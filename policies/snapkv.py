"""SnapKV (arXiv 2404.14469) and PyramidKV (arXiv 2406.02069): what the newest queries attend to,
with the same budget for every layer, or less from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from policies.base import CONTENT, Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.budgets import capped, uniform
from policies.scoring import attention_received, attention_scratch, best, best_scratch
from policies.scratch import Region


@dataclass(frozen=True, slots=True)
class SnapKV:
    """The last ``window`` tokens of the newest scale, and what their queries attend to most:
    softmax attention, averaged over the window and over ``pool`` neighbours, for each head.

    As kvpress's snapkv_press configures it. A window of 64 is more than a small budget, or than a
    coarse scale: it is at most half the budget and the whole scale.
    """

    window: int = 64
    pool: int = 5
    name: str = "snapkv"
    needs: Needs = CONTENT

    def __post_init__(self) -> None:
        if self.window <= 0:
            raise ValueError(f"window must be positive, got {self.window}")
        if self.pool <= 0 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and positive, got {self.pool}")

    def allocate(self, problem: Problem) -> Allocation:
        return capped(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        lanes, count = sizes.rows * sizes.heads, sizes.candidates
        return [
            *attention_scratch(sizes, min(self.window, sizes.fresh)),
            *best_scratch(sizes),
            Region("torch: pool", (lanes * count + 2 * self.window,), "float32", by_torch=True),
        ]

    def select(self, candidates: Candidates) -> Selection:
        fresh, budget = candidates.queries.shape[1], int(candidates.keep.max())
        window = min(self.window, fresh, max(1, budget // 2))
        newest = torch.arange(fresh - window, fresh, device=candidates.keys.device)
        scores = attention_received(candidates, newest)
        if self.pool > 1:
            scores = F.avg_pool1d(scores, self.pool, 1, self.pool // 2)
        scores[:, :, -window:] = torch.inf
        return Selection(best(scores, candidates.keep, candidates.scratch))


@dataclass(frozen=True, slots=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall from layer to layer, in a straight line to budget / ``beta`` in
    the last one; their mean is the budget.
    """

    beta: float = 20.0
    name: str = "pyramidkv"

    def __post_init__(self) -> None:
        SnapKV.__post_init__(self)
        if self.beta < 1.0:
            raise ValueError(f"beta must be at least 1, got {self.beta}")

    def budgets(self, layers: int, budget: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Tokens of each layer, [layers]; at least 1."""
        least = budget / self.beta
        falling = np.linspace(2 * budget - least, least, layers) if layers > 1 else budget
        return np.maximum(1, np.floor(np.atleast_1d(falling) + 1e-9)).astype(np.int64)

    def allocate(self, problem: Problem) -> Allocation:
        capped(problem)  # refuses a budget of no tokens
        budgets = self.budgets(problem.geometry.layers, problem.budget_tokens)
        seen = np.array(problem.schedule.seen)[:, None]
        return Allocation(uniform(problem, np.minimum(seen, budgets)))
