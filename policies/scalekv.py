"""ScaleKV (arXiv 2505.19602): drafter layers keep all they can, refiner layers share the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from policies.base import Step, uniform
from policies.profile import Preset, Profile
from policies.schedule import CacheGeometry, Lengths, ScaleSchedule


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


def split_budget(
    room: NDArray[np.int64], drafters: frozenset[int], budget: int, floor: int
) -> NDArray[np.int64]:
    """Tokens per layer, [layers]: mean ``budget``, drafters as much as they can hold, refiners
    alike.

    room: what each layer holds before it drops anything. The drafters' share is the largest one
    that leaves the refiners a whole number of tokens, not below ``floor`` (METHODS: this
    regenerates the published budgets).
    """
    layers = room.size
    refiners = layers - len(drafters)
    if not drafters or not refiners:
        return np.minimum(room, budget)
    limits = [int(room[layer]) for layer in drafters]
    most, rest = budget, budget * refiners
    for most in range(max(limits), budget - 1, -1):
        rest = budget * layers - sum(min(limit, most) for limit in limits)
        if rest >= floor * refiners and rest % refiners == 0:
            break
    tokens = np.full(layers, rest // refiners, dtype=np.int64)
    tokens[list(drafters)] = most
    return np.minimum(tokens, room)


def patch_centres(size: tuple[int, ...], grid: int) -> NDArray[np.int64]:
    """Token numbers of the centres of a grid x grid split of a scale; fewer if the scale is
    smaller.

    A (t, h, w) scale is read as t * h lines of w.
    """
    height, width = int(np.prod(size[:-1])), size[-1]

    def centres(side: int) -> NDArray[np.int64]:
        return np.unique(np.maximum(0, ((2 * np.arange(grid) + 1) * side - grid) // (2 * grid)))

    return (centres(height)[:, None] * width + centres(width)).ravel()


@lru_cache(maxsize=64)
def _centres_on(size: tuple[int, ...], grid: int, device: torch.device) -> Tensor:
    """patch_centres on the device, copied there once and not in every step."""
    with torch.inference_mode(False):  # they outlive a caller's inference_mode
        return torch.from_numpy(patch_centres(size, grid)).to(device)


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
    def num_queries(self) -> int:
        return self.grid * self.grid

    def lengths(self, schedule: ScaleSchedule, geometry: CacheGeometry, budget: int) -> Lengths:
        if budget < self.num_queries:
            raise ValueError(f"budget {budget} is below the window of {self.num_queries} tokens")
        if any(layer >= geometry.layers for roles in self.drafters for layer in roles):
            raise ValueError(f"a drafter is not one of the {geometry.layers} layers of this model")
        tokens = np.zeros((len(schedule), geometry.layers), dtype=np.int64)
        held = np.zeros(geometry.layers, dtype=np.int64)
        for scale, (fresh, seen) in enumerate(zip(schedule.tokens, schedule.seen, strict=True)):
            held = held + fresh
            if seen > budget:
                held = self._split(schedule, scale + 1, held, budget)
            tokens[scale] = held
        return uniform(schedule, geometry, tokens)

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
        floor = max(self.num_queries, int(self.refiner_share * budget))
        return split_budget(room, drafters, budget, floor)

    def select(self, step: Step) -> Tensor:
        """The window and the best scored others, per row and head, in the order they lie in."""
        cached = step.keys.shape[2] - step.queries.shape[1]
        centres = _centres_on(step.schedule.sizes[step.scale], self.grid, step.keys.device)
        queries = step.queries[:, centres].transpose(1, 2) * step.softmax_scale
        # softmax in place: [rows, heads, window, candidates] is the largest thing in here
        weights = (queries @ step.keys.transpose(2, 3)).float()
        weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
        shares = weights.sum(dim=-1, keepdim=True).reciprocal_().transpose(2, 3)
        scores = (shares @ weights).squeeze(2)  # [rows, heads, candidates]
        del weights
        if self.pool > 1:
            scores = F.avg_pool1d(scores, self.pool, 1, self.pool // 2, count_include_pad=False)
        scores.index_fill_(2, cached + centres, torch.inf)
        return scores.topk(int(step.keep[0]), dim=-1, sorted=False).indices.sort(dim=-1).values


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
