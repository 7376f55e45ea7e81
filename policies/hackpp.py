"""HACK++ (arXiv 2606.08302): HACK's kinds of heads, with a budget for each kind, layer and scale,
and another one for what a query attends to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from policies.base import Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.budgets import capped, proportional
from policies.hack import (
    WINDOW,
    contextual_heads,
    kinds_of,
    kinds_of_layer,
    which_heads,
    window_scores,
)
from policies.profile import Profile
from policies.scoring import attention_scratch, best, best_scratch, float32_blocks
from policies.scratch import Region, lasting, part_of

_NEEDS = Needs(content=True, planes=("scale",))


@dataclass(frozen=True, slots=True, eq=False)
class HackPP:
    """Cache budgets B_c in proportion to (reliance of a layer's heads of one kind) ** ``tau`` at
    every scale, their mean ``budget``; and queries that attend to the best ``attend_ratio`` x
    budget candidates.

    contextual: for each layer its contextual heads. mass: attention that a scale's queries give to
    each source scale, [scales, source scales, layers, heads] (Profile.mass).
    A contextual head ranks by the attention of ``WINDOW`` queries, the highest of ``pool``
    neighbours; a structural one by the scale prior of where a token comes from times the norm of
    its value, without any query.

    Not published: tau, the pool, and the prior's formula; here it is the mean attention that a
    token of the source scale gets at this scale. The published budgets, 30 % attended to and 10 %
    kept, are a ratio of 3.
    """

    contextual: tuple[frozenset[int], ...]
    mass: NDArray[np.float64]
    tau: float = 0.5
    attend_ratio: float = 3.0
    pool: int = 3
    name: str = "hackpp"
    needs: Needs = _NEEDS

    def __post_init__(self) -> None:
        if self.attend_ratio < 1.0:
            raise ValueError(f"attend_ratio must be at least 1, got {self.attend_ratio}")
        if self.pool <= 0 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and positive, got {self.pool}")

    def reliance(self, problem: Problem) -> NDArray[np.float64]:
        """gamma, [scales, layers, heads]: over all later scales, the mean attention that a cached
        token gets; equal within a layer's heads of one kind. 0 after the last scale.
        """
        seen = np.array(problem.schedule.seen, dtype=np.float64)
        scales, kinds = len(problem.schedule), kinds_of(self.contextual, *self.mass.shape[2:])
        earlier = np.tril(np.ones((scales, scales)), -1)[:, :, None, None]
        per_token = (self.mass * earlier).sum(axis=1)
        per_token[1:] /= seen[:-1, None, None]
        later = np.cumsum(per_token[::-1], axis=0)[::-1]
        gamma = np.concatenate([later[1:], np.zeros_like(later[:1])])
        for kind in (kinds, ~kinds):
            count = np.maximum(kind.sum(axis=1, keepdims=True), 1)
            mean = (gamma * kind).sum(axis=2, keepdims=True) / count
            gamma = np.where(kind, mean, gamma)
        return gamma

    def allocate(self, problem: Problem) -> Allocation:
        geometry, schedule, budget = problem.geometry, problem.schedule, problem.budget_tokens
        shape = (len(schedule), len(schedule), geometry.layers, geometry.heads)
        if self.mass.shape != shape:
            raise ValueError(f"hackpp was made for masses {self.mass.shape}, the model has {shape}")
        tokens = capped(problem).tokens  # refuses a budget of no tokens
        weights = self.reliance(problem) ** self.tau
        held = np.zeros(shape[2:], dtype=np.int64)
        for scale, fresh in enumerate(schedule.tokens[:-1]):
            room = held + fresh
            held = proportional(weights[scale], room, budget * room.size)
            tokens[scale] = held
        attended = np.full(len(schedule), int(self.attend_ratio * budget), dtype=np.int64)
        return Allocation(tokens, attended=attended)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        lanes, count = sizes.rows * sizes.heads, sizes.candidates
        most = replace(sizes, kept=max(sizes.kept, sizes.attended))
        return [
            *attention_scratch(sizes, min(WINDOW, sizes.fresh)),
            *best_scratch(most),
            Region("norms", (lanes, count), "float32"),
            Region("priors", (lanes, count), "float32"),
            Region("sources", (lanes, count), "int64"),
            Region("torch: pool", (lanes, count + self.pool), "float32", by_torch=True),
        ]

    def attend_to(self, candidates: Candidates) -> Tensor:
        return best(self._scores(candidates), candidates.keep, candidates.scratch)

    def select(self, candidates: Candidates) -> Selection:
        return Selection(best(self._scores(candidates), candidates.keep, candidates.scratch))

    def _scores(self, candidates: Candidates) -> Tensor:
        """S of each candidate, [rows, heads, candidates]; -1 where there is none."""
        rows, heads, count, _ = candidates.keys.shape
        scratch = candidates.scratch
        kinds = kinds_of_layer(self.contextual, candidates.layer, heads)
        scores = window_scores(candidates)
        if self.pool > 1:
            scores.copy_(F.max_pool1d(scores, self.pool, 1, self.pool // 2))
        norms = part_of(scratch["norms"], rows * heads, count)
        for start, end, block in float32_blocks(candidates.values, scratch):
            torch.linalg.vector_norm(block, dim=-1, out=norms[:, start:end])
        norms = norms.view(rows, heads, count)
        priors = part_of(scratch["priors"], rows, heads, count)
        sources = part_of(scratch["sources"], rows, heads, count)
        sources.copy_(candidates.planes["scale"])
        each = _priors(
            self, candidates.schedule.tokens, candidates.scale, candidates.layer, scores.device
        )
        torch.gather(each.expand(rows, -1, -1), 2, sources, out=priors)
        is_contextual = which_heads(tuple(kinds.tolist()), scores.device)
        torch.where(is_contextual, scores, norms.mul_(priors), out=scores)
        if candidates.log_weights is not None:
            scores.masked_fill_(candidates.log_weights.squeeze(2).isneginf(), -1.0)
        return scores


@lru_cache(maxsize=4096)
def _priors(
    policy: HackPP, tokens: tuple[int, ...], scale: int, layer: int, device: torch.device
) -> Tensor:
    """What a token of each source scale gets at this scale, float32 [1, heads, scales]."""
    each = policy.mass[scale, :, layer].T / np.array(tokens)
    return lasting(each.astype(np.float32)[None], device)


def hackpp_from(profile: Profile | None, share: float = 0.5, tau: float = 0.5) -> HackPP:
    """Kinds as ``hack_from``. Raises ValueError without a profile of version 2."""
    if profile is None:
        raise ValueError("hackpp needs a profile of the model: calibrate() makes one")
    mass, _ = profile.per_head("hackpp")
    return HackPP(contextual_heads(profile, share, "hackpp"), mass, tau)
