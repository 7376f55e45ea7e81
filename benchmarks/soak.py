"""Many generations of two caches on one pool, in a random mix: opened, advanced, forked, thinned
out, closed, failing. Every output is compared with that of the same generation drawn alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from kvruntime import (
    CacheGeometry,
    CacheOptions,
    Generation,
    OutOfPages,
    PagedKVCache,
    Pool,
    ScaleSchedule,
)

CHECK_EVERY = 500  # steps between two checks of the whole pool
SEEDS, MOST_OPEN, ROWS = 4, 6, 2


class Broken(Exception):
    """What a failing step raises."""


@dataclass
class Family:
    """A cache, and the inputs and outputs of its generations at each (seed, scale, layer)."""

    cache: PagedKVCache
    inputs: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    outputs: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def step(self, seed: int, scale: int, layer: int) -> Tensor:
        """q, k, v [3, rows, n, heads, head_dim] of a step."""
        key = (seed, scale, layer)
        if key not in self.inputs:
            geometry = self.cache.geometry
            tokens = self.cache.schedule.tokens[scale]
            generator = torch.Generator().manual_seed(hash(key) % 2**31)
            shape = (3, ROWS, tokens, geometry.heads, geometry.head_dim)
            numbers = torch.randn(shape, generator=generator)
            self.inputs[key] = numbers.to(getattr(torch, geometry.key_dtype))
        return self.inputs[key]

    def draw_alone(self, options: CacheOptions) -> None:
        """Outputs of every seed from a cache with a pool of its own and the same pages."""
        cache = PagedKVCache(
            self.cache.geometry,
            self.cache.schedule,
            options,
            softmax_scale=1.0,
            pool=Pool(
                num_pages=2 * self.cache.plan(ROWS).peak_pages,
                page_bytes=self.cache.page_bytes,
                plane_bytes=self.cache.plane_bytes,
            ),
        )
        for seed in range(SEEDS):
            with cache.open(ROWS) as alone:
                for scale in range(len(cache.schedule)):
                    for layer in range(cache.geometry.layers):
                        out = alone.attend(layer, *self.step(seed, scale, layer))
                        self.outputs[seed, scale, layer] = out.clone()


@dataclass
class Running:
    """An open generation: its next layer, and which rows of its seed are left."""

    family: Family
    generation: Generation
    seed: int
    layer: int = 0
    rows: tuple[int, ...] = tuple(range(ROWS))


def families(pool: Pool) -> list[Family]:
    """An exact cache with scored tokens, and one of four bits that folds, of other geometry."""
    first = CacheGeometry(2, 2, 32, "float32", "float32")
    second = CacheGeometry(3, 1, 64, "bfloat16", "bfloat16")
    made = []
    for geometry, schedule, options in (
        (first, ScaleSchedule.of([1, 2, 3, 4, 5, 6]), CacheOptions("scalekv", 20)),
        (
            second,
            ScaleSchedule.of([1, (2, 3), 3, (4, 3), 5]),
            CacheOptions("centroid", 9, kv_dtype="int4"),
        ),
    ):
        cache = PagedKVCache(geometry, schedule, options, softmax_scale=1.0, pool=pool)
        family = Family(cache)
        family.draw_alone(options)
        made.append(family)
    return made


def run(steps: int, progress: Progress | None, seed: int = 0) -> dict[str, Any]:
    """``steps`` random actions. Raises AssertionError at the first violation."""
    pool = Pool(num_pages=400, page_bytes=4096, plane_bytes=256)
    made = families(pool)
    chance, running = random.Random(seed), list[Running]()
    counts = dict.fromkeys(("open", "refused", "step", "fork", "thin", "fail", "close", "done"), 0)
    bar = progress.add_task("steps", total=steps) if progress else None
    for number in range(steps):
        action = _act(chance, made, running)
        counts[action] += 1
        if number % CHECK_EVERY == 0:
            pool.check()
            live = sum(one.generation.stats.live_pages for one in running)
            assert pool.stats.live_pages <= live, "a page that no generation holds"
            if progress and bar is not None:
                progress.update(bar, completed=number)
    for one in running:
        one.generation.close()
    pool.check()
    assert pool.stats.live_pages == 0, "leak"
    return {"steps": steps, "seed": seed, "actions": counts, "violations": 0, "leaked_pages": 0}


def _act(chance: random.Random, made: list[Family], running: list[Running]) -> str:
    """One random action; its name."""
    if not running or (len(running) < MOST_OPEN and chance.random() < 0.05):
        family = chance.choice(made)
        try:
            generation = family.cache.open(ROWS)
        except OutOfPages:
            return "refused"
        running.append(Running(family, generation, chance.randrange(SEEDS)))
        return "open"
    one = chance.choice(running)
    dice = chance.random()
    if dice < 0.01:
        one.generation.close()
        running.remove(one)
        return "close"
    if dice < 0.02:
        _fail(one)
        running.remove(one)
        return "fail"
    if one.layer == 0 and dice < 0.08:
        return _fork(one, running)
    if one.layer == 0 and dice < 0.10 and len(one.rows) > 1:
        kept = chance.randrange(len(one.rows))
        one.generation.keep_rows([kept])
        one.rows = (one.rows[kept],)
        return "thin"
    return _step(one, running)


def _fork(one: Running, running: list[Running]) -> str:
    if len(running) >= MOST_OPEN:
        return _step(one, running)
    try:
        twin = one.generation.fork()
    except OutOfPages:
        return "refused"
    running.append(Running(one.family, twin, one.seed, one.layer, one.rows))
    return "fork"


def _step(one: Running, running: list[Running]) -> str:
    scale = one.generation.scale
    q, k, v = one.family.step(one.seed, scale, one.layer)[:, list(one.rows)]
    out = one.generation.attend(one.layer, q, k, v)
    wanted = one.family.outputs[one.seed, scale, one.layer][list(one.rows)]
    if len(one.rows) == ROWS:
        assert torch.equal(out, wanted), f"scale {scale}, layer {one.layer}: not what it is alone"
    else:  # torch may round other numbers of rows differently
        assert torch.allclose(out, wanted, atol=1e-2), f"scale {scale}, layer {one.layer}"
    one.layer = (one.layer + 1) % one.family.cache.geometry.layers
    if one.generation.scale == len(one.family.cache.schedule):
        one.generation.close()
        running.remove(one)
        return "done"
    return "step"


def _fail(one: Running) -> None:
    """A step that raises after attention: the generation closes, nobody else notices."""
    runner = one.generation._runner

    def raising(*arguments: Any) -> None:
        raise Broken

    object.__setattr__(runner, "observer", raising)
    q, k, v = one.family.step(one.seed, one.generation.scale, one.layer)[:, list(one.rows)]
    try:
        one.generation.attend(one.layer, q, k, v)
    except Broken:
        return
    raise AssertionError("a failing step did not fail")
