"""H2O (arXiv 2306.14048): keep the tokens that got most attention so far, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from policies.base import Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.budgets import capped
from policies.scoring import attention_received, attention_scratch, best, best_scratch
from policies.scratch import Region, part_of

_QUERIES = 64  # scored with at a time
_NEEDS = Needs(content=True, planes=("score",))


@dataclass(frozen=True, slots=True)
class H2O:
    """Softmax attention of every query of every scale is added up for each stored token (the plane
    "score"). A lane keeps its newest tokens, ``recent_share`` of the budget, and beside them those
    with the highest sums.

    The original has half and half. In a picture the newest tokens are the bottom lines of a scale,
    no causal neighbours, and without them it does better (docs/policies.md): the default. Looking
    at all queries costs about what the scale's attention costs.
    """

    recent_share: float = 0.0
    name: str = "h2o"
    needs: Needs = _NEEDS

    def __post_init__(self) -> None:
        if not 0.0 <= self.recent_share < 1.0:
            raise ValueError(f"recent_share must be in [0, 1), got {self.recent_share}")

    def allocate(self, problem: Problem) -> Allocation:
        return capped(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        lanes = (sizes.rows, sizes.heads, sizes.candidates)
        some = sizes.rows * sizes.heads * sizes.candidates + 8 * _QUERIES
        return [
            *attention_scratch(sizes, min(_QUERIES, sizes.fresh)),
            *best_scratch(sizes),
            Region("totals", lanes, "float32"),
            Region("wanted", lanes, "float32"),
            Region("torch: queries", (some,), "uint8", by_torch=True),
        ]

    def select(self, candidates: Candidates) -> Selection:
        rows, heads, count, _ = candidates.keys.shape
        scratch, fresh = candidates.scratch, candidates.queries.shape[1]
        sums, ranks = (part_of(scratch[part], rows, heads, count) for part in ("totals", "wanted"))
        sums.copy_(candidates.planes["score"])
        for start in range(0, fresh, _QUERIES):
            some = torch.arange(start, min(start + _QUERIES, fresh), device=sums.device)
            sums.add_(attention_received(candidates, some))
        ranks.copy_(sums)
        if candidates.log_weights is not None:
            ranks.masked_fill_(candidates.log_weights.squeeze(2).isneginf(), -1.0)
        newest = min(fresh, int(self.recent_share * int(candidates.keep.min())))
        ranks[:, :, count - newest :] = torch.inf
        return Selection(best(ranks, candidates.keep, scratch), scores=sums)
