"""Any tokens at all: the floor that every policy must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from policies.base import CONTENT, Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.budgets import capped
from policies.scoring import best, best_scratch
from policies.scratch import Region, part_of


@dataclass(frozen=True, slots=True)
class Random:
    """``budget`` tokens of every lane, drawn for each head without regard to what they hold, alike
    in all rows. The same seed draws the same ones.
    """

    seed: int = 0
    name: str = "random"
    needs: Needs = CONTENT

    def allocate(self, problem: Problem) -> Allocation:
        return capped(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        scores = (sizes.rows, sizes.heads, sizes.candidates)
        return [*best_scratch(sizes), Region("scores", scores, "float32")]

    def select(self, candidates: Candidates) -> Selection:
        rows, heads, count, _ = candidates.keys.shape
        scores = part_of(candidates.scratch["scores"], rows, heads, count)
        numbers = np.random.default_rng((self.seed, candidates.scale, candidates.layer))
        drawn = numbers.random((1, heads, count), dtype=np.float32)  # rows may come in chunks
        scores.copy_(torch.from_numpy(drawn))
        if candidates.log_weights is not None:
            scores.masked_fill_(candidates.log_weights.squeeze(2).isneginf(), -1.0)
        return Selection(best(scores, candidates.keep, candidates.scratch))
