"""Centroids (ours): no token is dropped; each is folded into the kept one with the nearest key.

A kept token then stands for n tokens and its logit gets log n, which is exact where their keys are
equal: softmax over n equal keys is softmax over one with log n. docs/policies.md has the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.base import Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.budgets import capped
from policies.profile import Profile
from policies.schedule import Lengths
from policies.scoring import (
    ascending,
    best,
    best_scratch,
    beyond,
    evenly_spread,
    look,
    pick_queries,
    seen_scratch,
    take,
)
from policies.scratch import Region, lasting, part_of
from policies.sketches import sketch, sketch_scratch, sketch_size

_FAR = -1e30  # a product that no key reaches; finite, since its lowest bits become a number
_PACKED = 1024  # most seeds whose number fits into the bits of a product that can be spared
_PRODUCTS = 2**22  # compared at a time, over all lanes, if that leaves blocks of 64 candidates
_CACHED = 2**19  # the same on a CPU, whose cache they should not leave


@dataclass(frozen=True, slots=True, eq=False)
class Centroid:
    """``budget`` weighted centroids for every lane.

    A window of ``queries`` queries, spread evenly over the scale, stands for those of the next two
    scales: with ``query_means`` every other one is moved by as much as the mean query of its layer
    and head moves from this scale to the next one, the others to the one after it.

    Seeds are chosen in two rounds: ``first_share`` of them by the attention they get from the
    window, the rest where that attention times the distance from the nearest seed is largest. Then
    every other candidate goes to its nearest seed. Where seeds are more than three times a
    key's channels, keys are compared by sketches: how far they go in the directions in which most
    of them differ, a quarter as many. Two matrix products, together of (candidates - first seeds) x
    budget x sketch for each lane.

    What is folded is then fitted to what the window sees (kvruntime.step.refit), unless
    ``is_fitted`` is false.

    query_means: float32 [scales, layers, heads, head_dim], measured by calibration
    (Profile.query_means); None: the window stays where it is.
    """

    queries: int = 64
    first_share: float = 0.75
    is_fitted: bool = True
    query_means: NDArray[np.float32] | None = None
    name: str = "centroid"

    def __post_init__(self) -> None:
        if self.queries <= 0:
            raise ValueError(f"queries must be positive, got {self.queries}")
        if not 0.0 < self.first_share <= 1.0:
            raise ValueError(f"first_share must be in (0, 1], got {self.first_share}")

    @property
    def needs(self) -> Needs:
        refit = self.queries if self.is_fitted else 0
        return Needs(content=True, folds=True, planes=("log_weight",), refit=refit)

    def allocate(self, problem: Problem) -> Allocation:
        geometry, means = problem.geometry, self.query_means
        shape = (len(problem.schedule), geometry.layers, geometry.heads, geometry.head_dim)
        if means is not None and means.shape != shape:
            raise ValueError(f"query means are of {means.shape}, the model is {shape}")
        return capped(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        rows, heads, count = sizes.rows, sizes.heads, sizes.candidates
        lanes, kept = rows * heads, sizes.kept
        dim = sketch_size(sizes.head_dim, kept)
        block = _block(lanes, kept, count)
        return [
            *seen_scratch(sizes, min(self.queries, sizes.fresh)),
            *best_scratch(sizes),
            Region("sorted", (lanes, count), "float32"),
            Region("order", (lanes, count), "int64"),
            Region("torch: sort", (lanes, count, 2), "int64", by_torch=True),
            Region("seeds", (rows, heads, kept), "int64"),
            *sketch_scratch(sizes),
            Region("rest_sketches", (lanes, count, dim), "float32"),
            Region("seed_sketches", (lanes, kept, dim), "float32"),
            Region("turned", (lanes, dim, kept), "float32"),
            Region("halves", (lanes, kept), "float32"),
            Region("products", (lanes, block, kept), "float32"),
            Region("block_closest", (lanes, block), "float32"),
            Region("misfit", (lanes, count), "float32"),
            Region("closest", (2, lanes, count), "float32"),
            Region("nearest", (2, lanes, count), "int32"),
            Region("into", (lanes, count + 1), "int64"),
            Region("torch: nearest", (lanes, count, 2), "int64", by_torch=True),
        ]

    def select(self, candidates: Candidates) -> Selection:
        scratch, keys, keep = candidates.scratch, candidates.keys, candidates.keep
        rows, heads, count, _ = keys.shape
        lanes = rows * heads
        seen = look(candidates, self._window(candidates))
        scores = seen.received
        order = part_of(scratch["order"], lanes, count)
        ranked = part_of(scratch["sorted"], lanes, count)
        torch.sort(scores, dim=1, descending=True, out=(ranked, order))

        firsts = np.array([math.ceil(self.first_share * n) for n in keep.tolist()])
        most, first, least = int(keep.max()), int(firsts.max()), int(firsts.min())
        rest = order[:, least:]  # where heads differ, some of their own first seeds among them
        seeds = part_of(scratch["seeds"], rows, heads, most)
        flat = seeds.flatten(0, 1)
        flat[:, :first] = order[:, :first]
        found = [part_of(part, *rest.shape) for part in scratch["closest"]]
        nearest = [part_of(part, *rest.shape) for part in scratch["nearest"]]
        sketches = sketch(candidates)
        rest_sketches = _gather(sketches, rest, "rest_sketches", scratch)
        chosen = _gather(sketches, flat[:, :first], "seed_sketches", scratch)
        _compare(rest_sketches, chosen, firsts, found[0], nearest[0], scratch)
        if most > first:
            misfit = part_of(scratch["misfit"], *rest.shape)
            torch.linalg.vector_norm(rest_sketches[:, :, :-1], dim=-1, out=misfit)
            # above zero: a score of -1, where no token is, stays below those of tokens
            misfit.square_().sub_(found[0], alpha=2.0).clamp_(min=1e-30).sqrt_()
            by_head = misfit.mul_(ranked[:, least:]).view(rows, heads, -1)
            if first > least:  # a seed cannot be chosen again
                unused = beyond(tuple((firsts - least).tolist()), keys.device)
                by_head[:, :, : first - least].masked_fill_(~unused, -2.0)
            places = best(by_head, keep - firsts, scratch).flatten(0, 1)
            places.clamp_(max=rest.shape[1] - 1)
            flat[:, first:] = torch.gather(rest, 1, places)
            chosen = _gather(sketches, flat[:, first:], "seed_sketches", scratch)
            _compare(rest_sketches, chosen, keep - firsts, found[1], nearest[1], scratch)
            nearest[1].add_(first)
            torch.where(found[1] > found[0], nearest[1], nearest[0], out=nearest[0])
        if (keep != most).any():
            unused = beyond(tuple(firsts.tolist()), keys.device)
            seeds[:, :, :first].masked_fill_(unused, count)
            unused = beyond(tuple((keep - firsts).tolist()), keys.device)
            seeds[:, :, first:].masked_fill_(unused, count)
        places, into = _in_order(seeds, rest, nearest[0], count, scratch)
        return Selection(places, into, seen=seen if self.is_fitted else None)

    def _window(self, candidates: Candidates) -> Tensor:
        """The queries that stand for those of the next scale, [lanes, n, head_dim]."""
        queries, device = candidates.queries, candidates.keys.device
        rows, fresh, heads, dim = queries.shape
        which = evenly_spread(min(self.queries, fresh), fresh, device)
        window = pick_queries(queries, which, candidates.scratch)
        if self.query_means is not None:
            moves = _moves(self, candidates.scale, candidates.layer, device)
            for first, moved in enumerate(moves):
                window.view(rows, heads, -1, dim)[:, :, first :: len(moves)].add_(moved)
        return window.mul_(candidates.softmax_scale)


@lru_cache(maxsize=4096)
def _moves(policy: Centroid, scale: int, layer: int, device: torch.device) -> Tensor:
    """How far the mean query of each head goes from this scale to the next, and to the one after it
    (or the last one), [2, heads, 1, head_dim], on the device, copied there once.
    """
    means = policy.query_means
    assert means is not None
    last = len(means) - 1
    ahead = [means[min(scale + steps, last), layer] - means[scale, layer] for steps in (1, 2)]
    return lasting(np.stack(ahead)[:, :, None], device)


def _block(lanes: int, kept: int, count: int) -> int:
    """Candidates that are compared with all seeds at a time."""
    return min(count, max(64, _PRODUCTS // (lanes * kept)))


def _compare(
    sketches: Tensor,
    chosen: Tensor,
    counts: Lengths,
    closest: Tensor,
    nearest: Tensor,
    scratch: Mapping[str, Tensor],
) -> None:
    """For each of ``sketches`` [lanes, n, sketch] the nearest of ``chosen`` [lanes, m, sketch], of
    which each head uses the first ``counts``: its number into ``nearest``, sketch . chosen -
    |chosen|^2 / 2 into ``closest``.
    """
    lanes, most, dim = chosen.shape
    halves = part_of(scratch["halves"], lanes, most)
    torch.linalg.vector_norm(chosen[:, :, :-1], dim=-1, out=halves)
    halves.square_().mul_(-0.5)
    if (counts != most).any():
        unused = beyond(tuple(counts.tolist()), chosen.device)
        halves.view(-1, counts.size, most).masked_fill_(unused, _FAR)
    turned = part_of(scratch["turned"], lanes, dim, most).copy_(chosen.transpose(1, 2))
    turned[:, -1] = halves
    numbers = torch.arange(most, dtype=torch.int32, device=chosen.device)
    spared = (1 << max(1, (most - 1).bit_length())) - 1
    count, size = sketches.shape[1], scratch["products"].shape[1]
    if chosen.device.type == "cpu":
        size = min(size, max(64, _CACHED // (lanes * most)))
    for start in range(0, count, size):
        end = min(start + size, count)
        products = part_of(scratch["products"], lanes, end - start, most)
        torch.bmm(sketches[:, start:end], turned, out=products)
        if most <= _PACKED:  # the seed's number in the lowest bits: one pass finds both
            products.view(torch.int32).bitwise_and_(~spared).bitwise_or_(numbers)
            value = part_of(scratch["block_closest"], lanes, end - start)
            torch.amax(products, dim=-1, out=value)
            closest[:, start:end] = value
            nearest[:, start:end] = value.view(torch.int32).bitwise_and_(spared)
        else:
            closest[:, start:end], nearest[:, start:end] = products.max(dim=-1)


def _gather(sketches: Tensor, places: Tensor, name: str, scratch: Mapping[str, Tensor]) -> Tensor:
    """Sketches at places [lanes, n], in the region ``name``."""
    return take(sketches, places, part_of(scratch[name], *places.shape, sketches.shape[2]))


def _in_order(
    seeds: Tensor, rest: Tensor, nearest: Tensor, count: int, scratch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The seeds [rows, heads, m] ascending, and every candidate's seed by its new number."""
    rows, heads, most = seeds.shape
    keep, ranks = ascending(seeds, count, scratch)
    into = part_of(scratch["into"], rows * heads, count + 1)
    into.scatter_(1, rest, torch.gather(ranks.flatten(0, 1), 1, nearest.long()))
    number = torch.arange(most, device=seeds.device).expand_as(keep)
    into.scatter_(1, keep.flatten(0, 1), number.flatten(0, 1))  # also where others' keys are equal
    return keep, into[:, :count].view(rows, heads, count)


def centroid_from(profile: Profile | None) -> Centroid:
    """With the profile's query means, if it has any."""
    if profile is None or not profile.query_means:
        return Centroid()
    return Centroid(query_means=np.array(profile.query_means, dtype=np.float32))
