"""HeatKV (arXiv 2605.14877): for each head and source scale, all tokens or none, known before the
first picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from policies.base import Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.profile import Profile
from policies.recency import highest
from policies.schedule import ScaleSchedule
from policies.scratch import Region

_NEEDS = Needs(by_lane=True)


def heads_removed(
    schedule: ScaleSchedule, lanes: int, budget: float, sinks: int = 3
) -> NDArray[np.int64]:
    """x_t, [scales]: of every source scale, how many of the ``lanes`` heads of all layers have lost
    its tokens when scale t reads, so that a head holds ``budget`` tokens on average.

    0 while what is cached fits; else ceil(lanes (T_t - budget) / (T_t - R)) with T_t the tokens
    cached before t, R those of the first ``sinks`` scales, which stay (the released code's rule).
    """
    protected = schedule.first(sinks)
    removed = np.zeros(len(schedule), dtype=np.int64)
    for target, cached in enumerate(schedule.seen[:-1], start=1):
        if cached > budget and cached > protected:
            share = (cached - budget) / (cached - protected)
            removed[target] = min(lanes, math.ceil(lanes * share - 1e-9))
    return removed


@dataclass(frozen=True)
class HeatKV:
    """The heads that later scales attend to least lose a source scale first.

    orders: for each source scale from ``sinks`` on, but the last, (layer, head) in the order in
    which they lose it. ``heatkv_from`` sorts by S-CAS: the attention that all tokens of the source
    scale get from a query, mean over later scales. The first ``sinks`` scales stay.

    is_strict: no layer's write may take the sum over layers above the budget; what the next scale
    removes anyway goes one scale early where it must, last layers first and of those the larger
    source scales. Else only the state between scales keeps to it.
    """

    orders: tuple[tuple[tuple[int, int], ...], ...]
    sinks: int = 3
    is_strict: bool = False
    name: str = "heatkv"

    def __post_init__(self) -> None:
        if self.sinks <= 0:
            raise ValueError(f"sinks must be positive, got {self.sinks}")
        lanes = set(self.orders[0]) if self.orders else set()
        for order in self.orders:
            if set(order) != lanes or len(order) != len(lanes):
                raise ValueError("every order must name each head of every layer once")

    @property
    def needs(self) -> Needs:
        return _NEEDS

    def allocate(self, problem: Problem) -> Allocation:
        kept = _kept(self, problem)
        sizes = np.array(problem.schedule.tokens)[:, None, None]
        return Allocation((kept * sizes).sum(axis=1).astype(np.int64))

    def scratch(self, sizes: StepSizes) -> list[Region]:
        return []

    def select(self, candidates: Candidates) -> Selection:
        """The tokens of the source scales that each head keeps, in order."""
        kept = _kept(self, candidates.problem)[candidates.scale, :, candidates.layer]
        positions = candidates.positions[0].numpy()  # [heads, candidates]
        source = np.searchsorted(candidates.schedule.seen, positions, side="right")
        stays = np.take_along_axis(kept.T, np.where(positions < 0, 0, source), axis=1)
        ranks = np.where(stays & (positions >= 0), candidates.schedule.total - positions, -1)
        return highest(torch.from_numpy(ranks)[None], candidates.keep)


@lru_cache(maxsize=16)
def _kept(policy: HeatKV, problem: Problem) -> NDArray[np.bool_]:
    geometry = problem.geometry
    return sources_kept(
        policy.orders,
        problem.schedule,
        (geometry.layers, geometry.heads),
        problem.budget_tokens,
        policy.sinks,
        policy.is_strict,
    )


def sources_kept(
    orders: Sequence[Sequence[tuple[int, int]]],
    schedule: ScaleSchedule,
    shape: tuple[int, int],
    budget: float,
    sinks: int,
    is_strict: bool,
) -> NDArray[np.bool_]:
    """Whether a head holds the tokens of a source scale after a scale, [scales, source scales,
    layers, heads]; none after the last one. shape: layers and heads.

    Raises ValueError for orders of another model, and for a budget below the sinks.
    """
    scales, lanes = len(schedule), shape[0] * shape[1]
    first = schedule.first(sinks)
    if budget < first:
        raise ValueError(f"budget {budget} does not hold the {first} tokens of the sink scales")
    if len(orders) != max(0, scales - 1 - sinks):
        raise ValueError(
            f"orders must be of {max(0, scales - 1 - sinks)} source scales, {sinks} up to "
            f"{scales - 2}; got {len(orders)}"
        )
    ranks = np.full((scales, *shape), lanes)
    for source, order in enumerate(orders, start=sinks):
        if set(order) != {(layer, head) for layer in range(shape[0]) for head in range(shape[1])}:
            raise ValueError(
                f"the order of source scale {source} does not name each of {shape[0]} x {shape[1]} "
                "heads once"
            )
        for rank, place in enumerate(order):
            ranks[(source, *place)] = rank
    removed = heads_removed(schedule, lanes, budget, sinks)
    kept = np.zeros((scales, scales, *shape), dtype=bool)
    for scale in range(scales - 1):
        kept[scale, : scale + 1] = ranks[: scale + 1] >= removed[scale + 1]
    if is_strict:
        for scale in range(1, scales - 1):
            for atom in _early(kept, ranks, schedule, scale, budget * lanes):
                kept[(scale - 1, *atom)] = False
    return kept


def _early(
    kept: NDArray[np.bool_],
    ranks: NDArray[np.int64],
    schedule: ScaleSchedule,
    scale: int,
    most: float,
) -> list[tuple[int, int, int]]:
    """(source scale, layer, head) that must go before ``scale`` is drawn and not after, so that
    none of its writes, layer by layer, takes the sum over layers above ``most`` tokens.
    """
    sizes = np.array(schedule.tokens)[:, None, None]
    old, new = ((kept[at] * sizes).sum(axis=(0, 2)) for at in (scale - 1, scale))
    going = np.argwhere(kept[scale - 1] & ~kept[scale])
    order = sorted(going.tolist(), key=lambda atom: (-atom[1], -atom[0], ranks[tuple(atom)]))
    early: list[tuple[int, int, int]] = []
    for layer in range(old.size):
        while new[: layer + 1].sum() + old[layer + 1 :].sum() > most:
            if len(early) == len(order) or order[len(early)][1] <= layer:
                raise ValueError(f"scale {scale}: {most} tokens are too few for a strict budget")
            source, at, head = order[len(early)]
            old[at] -= schedule.tokens[source]
            early.append((source, at, head))
    return early


def heatkv_from(profile: Profile | None, sinks: int = 3, is_strict: bool = False) -> HeatKV:
    """Orders by S-CAS. Raises ValueError without a profile of version 2."""
    if profile is None:
        raise ValueError("heatkv needs a profile of the model: calibrate() makes one")
    mass, variance = profile.per_head("heatkv")
    scales, orders = len(mass), []
    for source in range(sinks, scales - 1):
        received = mass[source + 1 :, source].mean(axis=0)
        order = np.argsort(received, axis=None, kind="stable")
        layers, heads = np.unravel_index(order, variance.shape)
        orders.append(tuple(zip(layers.tolist(), heads.tolist(), strict=True)))
    return HeatKV(tuple(orders), sinks, is_strict)
