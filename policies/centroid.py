"""Centroids (ours): no token is dropped; each is folded into the kept one with the nearest key.

A kept token then stands for n tokens and its logit gets log n, which is exact where their keys are
equal: softmax over n equal keys is softmax over one with log n. docs/policies.md has the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policies.base import Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.budgets import capped
from policies.schedule import Lengths
from policies.scoring import (
    attention_received,
    attention_scratch,
    best,
    best_scratch,
    beyond,
    centres_on,
    float32_blocks,
)
from policies.scratch import Region, part_of

_FAR = -1e30  # a product that no key reaches; finite, since its lowest bits become a number
_PACKED = 1024  # most seeds whose number fits into the bits of a product that can be spared
BLOCK = 128  # candidates that are compared with all seeds at a time


@dataclass(frozen=True, slots=True)
class Centroid:
    """``budget`` weighted centroids for every lane.

    Seeds are chosen in two rounds: ``first_share`` of them by the attention they get from the
    window's queries, the rest where that attention times the distance from the nearest seed is
    largest. Then every candidate goes to its nearest seed. Two matrix products, together of
    candidates x budget x head_dim for each lane.

    grid: the window is grid x grid queries of the current scale.
    """

    grid: int = 4
    first_share: float = 0.75
    name: str = "centroid"

    def __post_init__(self) -> None:
        if self.grid <= 0:
            raise ValueError(f"grid must be positive, got {self.grid}")
        if not 0.0 < self.first_share <= 1.0:
            raise ValueError(f"first_share must be in (0, 1], got {self.first_share}")

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.grid * self.grid, weights=True)

    def allocate(self, problem: Problem) -> Allocation:
        return capped(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        rows, heads, count = sizes.rows, sizes.heads, sizes.candidates
        lanes, kept, dim = rows * heads, sizes.kept, sizes.head_dim
        block = min(BLOCK, count)
        return [
            *attention_scratch(sizes, self.needs.queries),
            *best_scratch(sizes),
            Region("seeds", (rows, heads, kept), "int64"),
            Region("seed_rows", (lanes, kept, dim), sizes.dtype),
            Region("seed_keys", (lanes, kept, dim), "float32"),
            Region("halves", (lanes, 1, kept), "float32"),
            Region("products", (lanes, block, kept), "float32"),
            Region("block_closest", (lanes, block), "float32"),
            Region("block_nearest", (lanes, block), "int32"),
            Region("block_norms", (lanes, block), "float32"),
            Region("closest", (lanes, count), "float32"),
            Region("misfit", (lanes, count + 1), "float32"),
            Region("nearest", (lanes, count + 1), "int64"),
            Region("torch: compare", (lanes, max(4 * block, 2 * kept)), "int64", by_torch=True),
        ]

    def select(self, candidates: Candidates) -> Selection:
        scratch, keys, keep = candidates.scratch, candidates.keys, candidates.keep
        rows, heads, count, _ = keys.shape
        size = candidates.schedule.sizes[candidates.scale]
        scores = attention_received(candidates, centres_on(size, self.grid, keys.device))
        firsts = np.array([math.ceil(self.first_share * n) for n in keep.tolist()])
        most, most_first = int(keep.max()), int(firsts.max())
        seeds = part_of(scratch["seeds"], rows, heads, most)
        seeds[:, :, :most_first] = best(scores, firsts, scratch)
        flat = seeds.flatten(0, 1)
        closest = part_of(scratch["closest"], rows * heads, count).fill_(_FAR)
        misfit = part_of(scratch["misfit"], rows * heads, count + 1)
        nearest = part_of(scratch["nearest"], rows * heads, count + 1)
        _compare(keys, flat[:, :most_first], firsts, 0, closest, misfit, nearest, scratch)
        if most > most_first:
            served = misfit[:, :count]  # squared distances from the nearest seed
            served.clamp_(min=0.0).sqrt_().mul_(scores.flatten(0, 1))
            misfit.scatter_(1, flat[:, :most_first], -2.0)  # a seed cannot be chosen again
            rest = best(served.view(rows, heads, count), keep - firsts, scratch)
            seeds[:, :, most_first:] = rest
            _compare(
                keys,
                flat[:, most_first:],
                keep - firsts,
                most_first,
                closest,
                misfit,
                nearest,
                scratch,
            )
        return _in_order(seeds, nearest, count, scratch)


def _compare(
    keys: Tensor,
    seeds: Tensor,
    counts: Lengths,
    number: int,
    closest: Tensor,
    misfit: Tensor,
    nearest: Tensor,
    scratch: Mapping[str, Tensor],
) -> None:
    """Note for every candidate the nearest of the seeds [lanes, m] where it is nearer than those
    before: ``nearest`` its number, counted from ``number``; ``closest`` key . seed - |seed|^2 / 2;
    ``misfit`` the squared distance from it.
    """
    heads = keys.shape[1]
    lanes, most = seeds.shape
    chosen = _seed_keys(keys, seeds, scratch)
    halves = part_of(scratch["halves"], lanes, 1, most)
    torch.linalg.vector_norm(chosen, dim=-1, out=halves.squeeze(1))
    halves.square_().mul_(-0.5)
    if (counts != most).any():
        unused = beyond(tuple(counts.tolist()), keys.device)
        halves.view(-1, heads, most).masked_fill_(unused, _FAR)
    numbers = torch.arange(most, dtype=torch.int32, device=keys.device)
    spared = (1 << max(1, (most - 1).bit_length())) - 1
    turned = chosen.transpose(1, 2)
    for start, end, block in float32_blocks(keys, scratch, BLOCK):
        products = part_of(scratch["products"], lanes, end - start, most)
        torch.baddbmm(halves, block, turned, out=products)
        value = part_of(scratch["block_closest"], lanes, end - start)
        if most <= _PACKED:  # the seed's number in the lowest bits: one pass finds both
            products.view(torch.int32).bitwise_and_(~spared).bitwise_or_(numbers)
            torch.amax(products, dim=-1, out=value)
            found = part_of(scratch["block_nearest"], lanes, end - start)
            torch.bitwise_and(value.view(torch.int32), spared, out=found)
        else:
            value, found = products.max(dim=-1)
        norms = part_of(scratch["block_norms"], lanes, end - start)
        torch.linalg.vector_norm(block, dim=-1, out=norms)
        is_nearer = value > closest[:, start:end]
        nearest[:, start:end] = torch.where(is_nearer, found + number, nearest[:, start:end])
        closest[:, start:end] = torch.maximum(value, closest[:, start:end])
        torch.add(norms.square_(), closest[:, start:end], alpha=-2.0, out=misfit[:, start:end])


def _seed_keys(keys: Tensor, seeds: Tensor, scratch: Mapping[str, Tensor]) -> Tensor:
    """The seeds' keys [lanes, m, head_dim] in float32."""
    lanes, most = seeds.shape
    shape = (lanes, most, keys.shape[3])
    lane = torch.arange(lanes, device=keys.device).unsqueeze(1)
    places = seeds.clamp(max=keys.shape[2] - 1)  # those that a shorter head does not use
    chosen = part_of(scratch["seed_keys"], *shape)
    raw = chosen if keys.dtype == chosen.dtype else part_of(scratch["seed_rows"], *shape)
    torch.ops.aten.index.Tensor_out(keys.flatten(0, 1), [lane, places], out=raw)
    return chosen if raw is chosen else chosen.copy_(raw)


def _in_order(
    seeds: Tensor, nearest: Tensor, count: int, scratch: Mapping[str, Tensor]
) -> Selection:
    """The seeds [rows, heads, m] ascending, and every candidate's seed by its new number."""
    rows, heads, most = seeds.shape
    ordered = (
        part_of(scratch["best_sorted"], rows, heads, most),
        part_of(scratch["best_order"], rows, heads, most),
    )
    torch.sort(seeds, dim=-1, out=ordered)
    keep, order = (part.flatten(0, 1) for part in ordered)
    number = torch.arange(most, device=seeds.device).expand_as(order)
    rank = part_of(scratch["best_places"], rows * heads, most).scatter_(1, order, number)
    into = torch.gather(rank, 1, nearest[:, :count])
    nearest[:, :count] = into
    nearest.scatter_(1, keep, number)  # also where another seed has the same key
    return Selection(ordered[0], nearest[:, :count].view(rows, heads, count))
