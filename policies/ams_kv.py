"""AMS-KV (arXiv 2511.16047): keep whole scales, the coarsest and the newest; more of them in some
layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.base import NO_NEEDS, Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.budgets import uniform
from policies.profile import Profile
from policies.recency import highest
from policies.scratch import Region


@dataclass(frozen=True, slots=True)
class AMSKV:
    """Pinned condensed scales plus the newest whole scales that fit, first in first out, alike in
    all heads.

    demanding: cache-demanding layers; they hold up to C_max tokens, the others up to C_min =
    ``min_share`` x budget, so that the layers' mean meets the budget. None: every layer gets the
    budget. A scale larger than its layer's capacity is not cached. Nothing is dropped while the
    history fits.
    """

    demanding: frozenset[int] = frozenset()
    min_share: float = 0.75
    condensed: int = 2
    name: str = "ams_kv"
    needs: Needs = NO_NEEDS

    def __post_init__(self) -> None:
        if not 0.0 < self.min_share <= 1.0:
            raise ValueError(f"min_share must be in (0, 1], got {self.min_share}")
        if self.condensed <= 0:
            raise ValueError(f"condensed must be positive, got {self.condensed}")

    def capacities(self, layers: int, budget: int) -> NDArray[np.int64]:
        """Most tokens each layer holds, [layers]; their mean is at most ``budget``."""
        if any(not 0 <= layer < layers for layer in self.demanding):
            raise ValueError(f"a demanding layer is not one of the {layers} layers of this model")
        count = len(self.demanding)
        if count in (0, layers):
            return np.full(layers, budget, dtype=np.int64)
        least = int(self.min_share * budget)
        capacities = np.full(layers, least, dtype=np.int64)
        capacities[list(self.demanding)] = (budget * layers - least * (layers - count)) // count
        return capacities

    def allocate(self, problem: Problem) -> Allocation:
        schedule, budget = problem.schedule, problem.budget_tokens
        capacities = self.capacities(problem.geometry.layers, budget)
        pinned = schedule.first(self.condensed)
        if capacities.min() < pinned:
            raise ValueError(
                f"budget {budget} gives a layer {capacities.min()} tokens, the first "
                f"{self.condensed} scales need {pinned}"
            )
        held: list[list[int]] = [[] for _ in capacities]  # tokens of the scales a layer holds
        tokens = np.zeros((len(schedule), problem.geometry.layers), dtype=np.int64)
        for scale, (fresh, seen) in enumerate(zip(schedule.tokens, schedule.seen, strict=True)):
            for layer, capacity in enumerate(capacities.tolist()):
                mine = held[layer]
                if scale < self.condensed or seen <= budget or fresh <= capacity - pinned:
                    mine.append(fresh)
                while seen > budget and sum(mine) > capacity and len(mine) > self.condensed:
                    del mine[self.condensed]
                tokens[scale, layer] = sum(mine)
        return Allocation(uniform(problem, tokens))

    def scratch(self, sizes: StepSizes) -> list[Region]:
        return []

    def select(self, candidates: Candidates) -> Selection:
        schedule, positions = candidates.schedule, candidates.positions
        start, end = schedule.span(candidates.scale)
        pinned = schedule.first(self.condensed)
        is_pinned = (positions >= 0) & (positions < pinned)
        room = int(candidates.keep[0]) - int(is_pinned[0, 0].sum())
        ranks = positions.masked_fill(is_pinned, schedule.total)
        if room < end - start and start >= pinned:  # this scale is too large for the layer
            ranks = ranks.masked_fill(positions >= start, -1)
        return highest(ranks, candidates.keep)


def ams_kv_from(profile: Profile | None, share: float = 0.25, min_share: float = 0.75) -> AMSKV:
    """The ``share`` of layers whose keys change most from scale to scale demand cache (section
    2.1).
    """
    if profile is None:
        return AMSKV()
    similarity = np.array(profile.similarity).mean(axis=0)  # 0 at scale 0, for all layers
    count = max(1, round(share * similarity.size))
    return AMSKV(frozenset(np.argsort(similarity, kind="stable")[:count].tolist()), min_share)
