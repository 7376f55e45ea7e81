"""ScaleKV (arXiv 2505.19602): drafter layers keep all they can, refiner layers share the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from policies.base import Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.budgets import split_budget, uniform
from policies.profile import Preset, Profile
from policies.schedule import ScaleSchedule
from policies.scoring import attention_received, attention_scratch, best, best_scratch, centres_on
from policies.scratch import Region


def drafters_from_selectivity(profile: Profile, share: float) -> tuple[frozenset[int], ...]:
    """Drafter layers of every scale: the ``share`` of (scale, layer) pairs with the smallest
    z-score.

    Z(l, k) = (ASI(l, k) - mean over layers) / (deviation over layers + eps), section 3.3 eq. 3.
    Scale 0 reads no cache and has no roles.
    """
    selectivity = np.array(profile.selectivity)[1:]
    if not selectivity.size:
        return ()
    centred = selectivity - selectivity.mean(axis=1, keepdims=True)
    z = centred / (selectivity.std(axis=1, keepdims=True) + 1e-9)
    count = max(1, round(share * z.size))
    chosen = np.zeros(z.size, dtype=bool)
    chosen[np.argsort(z, axis=None, kind="stable")[:count]] = True
    roles = chosen.reshape(z.shape)
    return (frozenset(), *(frozenset(np.flatnonzero(line).tolist()) for line in roles))


@dataclass(frozen=True, slots=True)
class ScaleKV:
    """Layer budgets by drafter and refiner roles, tokens by the attention of 16 patch centres.

    drafters[n]: the layers that are drafters when scale n reads the cache; scales past the end
        use the last entry. Empty: no statistics, every layer gets the same budget.
    published: budgets to use as they stand where budget and schedule are the published ones.
    grid: the window is grid x grid queries of the current scale.
    pool: width of the average pooling over neighbouring scores, odd; 1 is none.
    refiner_share: least share of the budget that a refiner keeps; never below the window.

    Queries are the model's own, after norm and rotation; the released code projects raw ones.
    """

    drafters: tuple[frozenset[int], ...] = ()
    published: Preset | None = None
    grid: int = 4
    pool: int = 1
    refiner_share: float = 0.0
    name: str = "scalekv"

    def __post_init__(self) -> None:
        if self.grid <= 0:
            raise ValueError(f"grid must be positive, got {self.grid}")
        if not 0.0 <= self.refiner_share <= 1.0:
            raise ValueError(f"refiner_share must be in [0, 1], got {self.refiner_share}")
        if self.pool <= 0 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and positive, got {self.pool}")

    @property
    def window(self) -> int:
        """Queries that score, and tokens that are always kept."""
        return self.grid * self.grid

    @property
    def needs(self) -> Needs:
        return Needs(content=True)

    def allocate(self, problem: Problem) -> Allocation:
        schedule, budget, layers = (
            problem.schedule,
            problem.budget_tokens,
            problem.geometry.layers,
        )
        if budget < self.window:
            raise ValueError(
                f"budget {budget} is below the window of {self.window} tokens: give as many or more"
            )
        if any(not 0 <= layer < layers for roles in self.drafters for layer in roles):
            raise ValueError(f"a drafter is not one of the {layers} layers of this model")
        tokens = np.zeros((len(schedule), layers), dtype=np.int64)
        held = np.zeros(layers, dtype=np.int64)
        for scale, (fresh, seen) in enumerate(zip(schedule.tokens, schedule.seen, strict=True)):
            held = held + fresh
            if seen > budget:
                held = self._split(schedule, scale + 1, held, budget)
            tokens[scale] = held
        return Allocation(uniform(problem, tokens))

    def _split(
        self, schedule: ScaleSchedule, reader: int, room: NDArray[np.int64], budget: int
    ) -> NDArray[np.int64]:
        """Tokens per layer for the cache that scale ``reader`` reads."""
        if not self.drafters or reader == len(schedule):
            return np.minimum(room, budget)
        drafters = self.drafters[min(reader, len(self.drafters) - 1)]
        preset = self.published
        if preset and (budget, schedule.sizes) == (preset.budget_tokens, preset.sizes):
            drafter, refiner = preset.budgets[reader - preset.first_scale]
            tokens = np.full(room.size, refiner, dtype=np.int64)
            tokens[list(drafters)] = drafter
            return np.minimum(tokens, room)
        floor = max(self.window, int(self.refiner_share * budget))
        return split_budget(room, drafters, budget, floor)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        scores = sizes.rows * sizes.heads * sizes.candidates
        pooled = []
        if self.pool > 1:  # the pooled scores, and the window's places as int64
            pooled = [Region("torch: pool", (scores + 2 * self.window,), "float32", by_torch=True)]
        return [*attention_scratch(sizes, self.window), *best_scratch(sizes), *pooled]

    def select(self, candidates: Candidates) -> Selection:
        """The window and the best scored others, per row and head, in the order they lie in."""
        size = candidates.schedule.sizes[candidates.scale]
        centres = centres_on(size, self.grid, candidates.keys.device)
        scores = attention_received(candidates, centres)
        if self.pool > 1:
            scores = F.avg_pool1d(scores, self.pool, 1, self.pool // 2, count_include_pad=False)
        scores.index_fill_(2, candidates.cached + centres, torch.inf)
        return Selection(best(scores, candidates.keep, candidates.scratch))


def scalekv_from(
    profile: Profile | None,
    preset: Preset | None,
    share: float = 0.1,
    refiner_share: float = 0.8,
) -> ScaleKV:
    """Roles from a profile, else from a published preset, else none.

    share of the pairs are drafters, refiners keep refiner_share of the budget: measured on the
    bundled model (docs/policies.md). A preset follows the published rule, without such a floor.
    """
    if profile is not None:
        roles = drafters_from_selectivity(profile, share)
        return ScaleKV(roles, refiner_share=refiner_share)
    if preset is not None:
        early = (preset.drafters[0],) * preset.first_scale
        return ScaleKV(tuple(frozenset(roles) for roles in early + preset.drafters), preset)
    return ScaleKV()
