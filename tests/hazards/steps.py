"""Generations of random tokens, step by step, that hazards happen to."""

from dataclasses import dataclass

import numpy as np
import torch

from kvruntime import CacheOptions, PagedKVCache, Pool
from policies import Allocation, CacheGeometry, Needs, ScaleKV, ScaleSchedule, Selection
from policies.recency import highest

SCHEDULE = ScaleSchedule.of([1, 2, 3, 4, 5, 6])
SCALES = len(SCHEDULE)
GEOMETRY = CacheGeometry(2, 3, 32, "float32", "float32")
FORMATS = [
    {},
    {"kv_dtype": "int4", "kv_start": 2, "page_size": 8},
    {"kv_dtype": "int8", "kv_groups": 2, "page_size": 8},
]


def cache_of(policy, pool=None, observer=None, **options):
    chosen = ScaleKV(grid=2) if policy == "scalekv" else policy
    chosen = CacheOptions(policy=chosen, budget=20, **{"page_size": 4, "workspace": 1} | options)
    return PagedKVCache(GEOMETRY, SCHEDULE, chosen, softmax_scale=0.2, pool=pool, observer=observer)


def tokens(scale, layer, seed, rows=2):
    """q, k, v of a step, the same whenever it is asked again."""
    generator = torch.Generator().manual_seed(10_000 * seed + 100 * scale + layer)
    shape = (rows, SCHEDULE.tokens[scale], GEOMETRY.heads, GEOMETRY.head_dim)
    return tuple(torch.randn(shape, generator=generator) for _ in "qkv")


def step(generation, seed):
    return generation.attend(generation._layer, *tokens(generation.scale, generation._layer, seed))


def steps(generation, seed, until=SCALES):
    """Attention of every step up to a scale."""
    out = []
    while generation.scale < until:
        out.append(step(generation, seed))
    return out


def alone(policy, seed, **options):
    """What a generation computes that has a pool for itself."""
    with cache_of(policy, **options).open(2) as generation:
        return steps(generation, seed)


def pool_for(cache, generations):
    return Pool(
        num_pages=generations * cache.plan(2).peak_pages,
        page_bytes=cache.page_bytes,
        plane_bytes=cache.plane_bytes,
    )


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Breathing:
    """Lanes grow, shrink and grow again. Keeps what is near the border of cached and fresh, so that
    cached tokens move to the front; or whatever has the largest keys.
    """

    needs: Needs
    name: str = "breathing"

    def allocate(self, problem):
        tokens = np.array([1, 5, 14, 4, 20, 0])[:, None, None]
        shape = (SCALES, problem.geometry.layers, problem.geometry.heads)
        return Allocation(np.broadcast_to(tokens, shape).copy())

    def scratch(self, sizes):
        return []

    def select(self, candidates):
        if self.needs.content:
            best = candidates.keys[..., 0].topk(int(candidates.keep.max())).indices
            return Selection(best.sort(dim=-1).values)
        border = candidates.schedule.span(candidates.scale)[0]
        return highest(-(candidates.positions - border).abs(), candidates.keep)
