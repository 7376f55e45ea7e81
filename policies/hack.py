"""HACK (arXiv 2504.09261): contextual heads look at few tokens and keep few, structural heads look
along lines and keep the first scales and the newest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.base import Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.profile import Profile
from policies.scoring import (
    BLOCK,
    attention_received,
    attention_scratch,
    best,
    best_scratch,
    beyond,
    evenly_spread,
    take,
)
from policies.scratch import Region, lasting, part_of

WINDOW = 32  # N_obs: queries that tokens are scored with
FIRST_SCALES = 2  # that structural heads always keep
_ABOVE = 2.0 * WINDOW  # any score
_NEEDS = Needs(content=True, folds=True)


@dataclass(frozen=True, slots=True)
class Hack:
    """Two kinds of heads with a budget each, B_C and B_S = B_C / ``ratio``, their mean ``budget``.

    contextual: for each layer its contextual heads; the others are structural. ``hack_from`` takes
    the ``share`` with the least variance of attention over queries.

    A contextual head keeps what ``WINDOW`` queries, spread evenly, attend to most; after the last
    scale that is read, what it drops is merged into the kept token with the most similar key
    (cosine): plain means, as LOOK-M merges, without log weights. A structural head keeps the first
    two scales, then the newest one, then what the same queries attend to most.

    Not published: the share (alpha) and the ratio, chosen on the bundled model (docs/policies.md).
    Where B_S does not hold the newest scale, the same scores decide within it. The paper lets
    attention and cache share one budget; here every query sees all candidates.
    """

    contextual: tuple[frozenset[int], ...] = ()
    ratio: float = 0.5
    name: str = "hack"
    needs: Needs = _NEEDS

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")

    def allocate(self, problem: Problem) -> Allocation:
        geometry, schedule, budget = problem.geometry, problem.schedule, problem.budget_tokens
        kinds = kinds_of(self.contextual, geometry.layers, geometry.heads)
        structural, contextual = budgets_by_kind(kinds, self.ratio, budget)
        first = schedule.first(FIRST_SCALES)
        if structural <= first or contextual <= 0:
            raise ValueError(
                f"budget {budget} gives structural heads {structural} tokens and contextual ones "
                f"{contextual}: the first two scales alone are {first}"
            )
        most = np.where(kinds, contextual, structural)
        tokens = np.minimum(np.array(schedule.seen)[:, None, None], most).astype(np.int64)
        tokens[-1] = 0
        return Allocation(tokens)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        return [
            *attention_scratch(sizes, min(WINDOW, sizes.fresh)),
            *best_scratch(sizes),
            *merge_scratch(sizes),
        ]

    def select(self, candidates: Candidates) -> Selection:
        scores = window_scores(candidates)
        kinds = kinds_of_layer(self.contextual, candidates.layer, candidates.keep.size)
        favour_structure(scores, candidates, ~kinds)
        keep = best(scores, candidates.keep, candidates.scratch)
        is_last = candidates.scale + 2 == len(candidates.schedule)
        return Selection(keep, merge(candidates, keep, kinds & is_last))


def kinds_of(contextual: tuple[frozenset[int], ...], layers: int, heads: int) -> NDArray[np.bool_]:
    """Whether each head is contextual, [layers, heads]; none is where nothing is said. Raises
    ValueError for layers or heads that the model has not.
    """
    if len(contextual) not in (0, layers):
        raise ValueError(f"heads of {len(contextual)} layers, the model has {layers}")
    if any(not 0 <= head < heads for mine in contextual for head in mine):
        raise ValueError(f"a contextual head is not one of the {heads} of a layer")
    return np.stack([kinds_of_layer(contextual, layer, heads) for layer in range(layers)])


def kinds_of_layer(
    contextual: tuple[frozenset[int], ...], layer: int, heads: int
) -> NDArray[np.bool_]:
    """The same of one layer, [heads]."""
    return np.isin(np.arange(heads), list(contextual[layer]) if contextual else [])


def budgets_by_kind(kinds: NDArray[np.bool_], ratio: float, budget: int) -> tuple[int, int]:
    """Tokens of a structural and of a contextual head, whose mean is at most ``budget`` and misses
    it by less than one.
    """
    few, many = int(kinds.sum()), int((~kinds).sum())
    if not few or not many:
        return budget, budget
    total = budget * (few + many)
    structural = int(total / (many + ratio * few))
    return structural, (total - structural * many) // few


def window_scores(candidates: Candidates) -> Tensor:
    """Attention from WINDOW queries that are spread evenly, as ``attention_received``."""
    fresh = candidates.queries.shape[1]
    which = evenly_spread(min(WINDOW, fresh), fresh, candidates.keys.device)
    return attention_received(candidates, which)


def favour_structure(scores: Tensor, candidates: Candidates, structural: NDArray[np.bool_]) -> None:
    """In these heads the first two scales before the newest one, and that before all others."""
    above = which_heads(tuple(structural.tolist()), scores.device) * _ABOVE
    scores[:, :, candidates.cached :].add_(above)
    scores[:, :, : candidates.schedule.first(FIRST_SCALES)].add_(above, alpha=2.0)


@lru_cache(maxsize=256)
def which_heads(heads: tuple[bool, ...], device: torch.device) -> Tensor:
    """Some heads of a layer, bool [heads, 1], on the device, copied there once."""
    return lasting(np.array(heads)[:, None], device)


def merge_scratch(sizes: StepSizes) -> list[Region]:
    """What ``merge`` works in, beside ``best_scratch``."""
    lanes, kept, dim = sizes.rows * sizes.heads, sizes.kept, sizes.head_dim
    block = min(BLOCK, sizes.candidates)
    return [
        Region("into", (sizes.rows, sizes.heads, sizes.candidates + 1), "int64"),
        Region("kept_keys", (lanes, kept, dim), sizes.dtype),
        Region("unit_keys", (lanes, kept, dim), "float32"),
        Region("norms", (lanes, kept, 1), "float32"),
        Region("some_keys", (lanes, block, dim), "float32"),
        Region("likeness", (lanes, block, kept), "float32"),
        Region("most_like", (lanes, block), "int64"),
        Region("torch: places", (lanes, max(sizes.candidates, kept)), "int64", by_torch=True),
    ]


def merge(candidates: Candidates, keep: Tensor, merges: NDArray[np.bool_]) -> Tensor:
    """Where each candidate goes, [rows, heads, candidates]: kept ones to themselves, the others of
    heads that merge to the kept token with the most similar key, those of other heads nowhere.
    """
    rows, heads, count, _ = candidates.keys.shape
    into = part_of(candidates.scratch["into"], rows, heads, count + 1).fill_(-1)
    if merges.any():
        _most_like(candidates, keep, into[:, :, :count])
        into.masked_fill_(which_heads(tuple((~merges).tolist()), into.device), -1)
        if candidates.log_weights is not None:
            into[:, :, :count].masked_fill_(candidates.log_weights.squeeze(2).isneginf(), -1)
    number = torch.arange(keep.shape[2], device=keep.device).expand_as(keep)
    return into.scatter_(2, keep, number)[:, :, :count]


def _most_like(candidates: Candidates, keep: Tensor, into: Tensor) -> None:
    """For every candidate the kept token whose key has the greatest cosine with its own."""
    keys, scratch = candidates.keys, candidates.scratch
    rows, heads, count, dim = keys.shape
    lanes, most = rows * heads, keep.shape[2]
    kept = part_of(scratch["kept_keys"], rows, heads, most, dim)
    take(keys.flatten(0, 1), keep.clamp(max=count - 1).flatten(0, 1), kept.flatten(0, 1))
    unit = part_of(scratch["unit_keys"], lanes, most, dim).copy_(kept.flatten(0, 1))
    norms = part_of(scratch["norms"], lanes, most, 1)
    torch.linalg.vector_norm(unit, dim=-1, keepdim=True, out=norms)
    unit.div_(norms.clamp_(min=1e-12))
    unused = None
    if (candidates.keep != most).any():
        unused = beyond(tuple(candidates.keep.tolist()), keys.device).unsqueeze(1)
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        some = part_of(scratch["some_keys"], lanes, end - start, dim)
        some.copy_(keys[:, :, start:end].flatten(0, 1))
        likeness = part_of(scratch["likeness"], lanes, end - start, most)
        torch.bmm(some, unit.transpose(1, 2), out=likeness)
        if unused is not None:
            likeness.view(rows, heads, end - start, most).masked_fill_(unused, -torch.inf)
        found = part_of(scratch["most_like"], lanes, end - start)
        torch.argmax(likeness, dim=-1, out=found)
        into[:, :, start:end] = found.view(rows, heads, end - start)


def hack_from(profile: Profile | None, share: float = 0.5, ratio: float = 0.5) -> Hack:
    """The ``share`` of heads with the least column variance are contextual; without a profile all
    heads are structural.
    """
    if profile is None:
        return Hack(ratio=ratio)
    return Hack(contextual_heads(profile, share, "hack"), ratio)


def contextual_heads(profile: Profile, share: float, policy: str) -> tuple[frozenset[int], ...]:
    """For each layer the heads among the ``share`` with the least column variance."""
    _, variance = profile.per_head(policy)
    layers, heads = variance.shape
    least = np.argsort(variance, axis=None, kind="stable")[: round(share * variance.size)]
    chosen = {(int(place) // heads, int(place) % heads) for place in least}
    return tuple(
        frozenset(head for head in range(heads) if (layer, head) in chosen)
        for layer in range(layers)
    )
