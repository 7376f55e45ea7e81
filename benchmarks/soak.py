"""Many generations of many caches on one pool, in threads: random policies and schedules, forks,
rows that go or are repeated, cancellations and faults. Every output is compared with that of the
same generation drawn alone.
"""

from __future__ import annotations

import gc
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from rich.progress import Progress
from torch import Tensor

from kvruntime import (
    Admission,
    CacheGeometry,
    CacheOptions,
    Cancelled,
    Generation,
    OutOfPages,
    PagedKVCache,
    Pool,
    ScaleSchedule,
    Ticket,
)

PAGE_BYTES, PLANE_BYTES = 4096, 256
NUM_PAGES = 150  # of which the largest generation needs about two thirds
FAMILIES, SEEDS, ROWS, THREADS = 12, 3, 2, 4
CHECK_EVERY = 100  # generations between two checks of everything
WARM = 0.2  # of the generations, before memory is looked at
_GEOMETRIES = (
    CacheGeometry(2, 2, 32, "float32", "float32"),
    CacheGeometry(3, 1, 64, "bfloat16", "bfloat16"),
    CacheGeometry(1, 4, 32, "float16", "float16"),
)
_POLICIES = (
    ("full", 1.0, None),
    ("full", 1.0, "int8"),
    ("scalekv", 20, None),
    ("scalekv", 20, "int4"),
    ("ams_kv", 0.5, None),
    ("h2o", 9, None),
    ("pyramidkv", 20, None),
    ("centroid", 9, "int4"),
    ("centroid", 20, None),
    ("streaming_llm", 12, "int2"),
    ("random", 7, None),
)
_SIZES: tuple[int | tuple[int, int], ...] = (1, 2, 3, 4, (2, 3), (4, 3), 5)


class Fault(Exception):
    """What a failing step raises."""


@dataclass
class Family:
    """A cache, and the inputs and outputs of its generations at each (seed, scale, layer)."""

    cache: PagedKVCache
    steps: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def draw_alone(self, options: CacheOptions) -> None:
        """All of them, from a cache with a pool of its own and the same pages."""
        geometry, schedule = self.cache.geometry, self.cache.schedule
        pages = self.cache.plan(ROWS).peak_pages
        pool = Pool(num_pages=pages, page_bytes=PAGE_BYTES, plane_bytes=PLANE_BYTES)
        cache = PagedKVCache(geometry, schedule, options, softmax_scale=1.0, pool=pool)
        for seed in range(SEEDS):
            generator = torch.Generator().manual_seed(seed)
            with cache.open(ROWS) as alone:
                for scale, tokens in enumerate(schedule.tokens):
                    for layer in range(geometry.layers):
                        shape = (3, ROWS, tokens, geometry.heads, geometry.head_dim)
                        inputs = torch.randn(shape, generator=generator)
                        inputs = inputs.to(getattr(torch, geometry.key_dtype))
                        out = alone.attend(layer, *inputs).clone()
                        self.steps[seed, scale, layer] = inputs, out


def families(admission: Admission, chance: random.Random) -> list[Family]:
    """Caches of random policies, formats and schedules. One that cannot be is drawn again."""
    made: list[Family] = []
    while len(made) < FAMILIES:
        geometry = chance.choice(_GEOMETRIES)
        schedule = ScaleSchedule.of([1, *chance.choices(_SIZES, k=chance.randint(2, 5)), 4])
        policy, budget, kv_dtype = chance.choice(_POLICIES)
        options = CacheOptions(policy, budget, kv_dtype=kv_dtype)
        try:
            cache = PagedKVCache(
                geometry, schedule, options, softmax_scale=1.0, admission=admission
            )
        except ValueError:  # a budget below a policy's window, say
            continue
        if not NUM_PAGES / 5 < cache.plan(ROWS).peak_pages <= NUM_PAGES * 2 / 3:
            continue  # too small to wait, or to let others in
        family = Family(cache)
        family.draw_alone(options)
        made.append(family)
    return made


class Soak:
    """What the threads share."""

    def __init__(self, generations: int, seed: int, progress: Progress | None) -> None:
        pool = Pool(num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, plane_bytes=PLANE_BYTES)
        self.admission = Admission(pool)
        self.families = families(self.admission, random.Random(seed))
        self.ended: Counter[str] = Counter()
        self.waited = 0
        self.resident: list[tuple[int, int]] = []  # generations, bytes
        self.failures: list[BaseException] = []
        self._numbers = iter(range(generations))
        self._lock = threading.Lock()
        self._progress = progress
        self._bar = progress.add_task("generations", total=generations) if progress else None

    def work(self, seed: int) -> None:
        """Draw until all are drawn, or somebody has found a violation."""
        chance = random.Random(seed)
        try:
            while not self.failures:
                with self._lock:
                    number = next(self._numbers, None)
                if number is None:
                    return
                how = self._one(chance)
                with self._lock:
                    self.ended[how] += 1
                    if number % CHECK_EVERY == 0:
                        self._look(number)
        except BaseException as error:
            self.failures.append(error)

    def _look(self, number: int) -> None:
        self.admission.check()
        self.admission.pool.check()
        self.resident.append((number, psutil.Process().memory_info().rss))
        if self._progress and self._bar is not None:
            self._progress.update(self._bar, completed=number)

    def _one(self, chance: random.Random) -> str:
        """One generation; how it ended."""
        family = chance.choice(self.families)
        fate = chance.choices(
            ("drawn", "fork", "thinned", "branched", "fault", "cancelled", "left"),
            (50, 10, 10, 10, 8, 8, 4),
        )[0]
        when = chance.randrange(len(family.cache.schedule))
        rows, rows_from = ROWS, {}
        if fate == "branched" and when:
            rows, rows_from = 1, {when: ROWS}
        ticket = self.admission.submit(family.cache.plan(rows, rows_from))
        self.waited += not ticket.has_started
        try:
            if fate == "left":
                ticket.cancel()
                return fate
            with family.cache.open(rows, rows_from, ticket) as generation:
                _draw(family, generation, chance.randrange(SEEDS), fate, when, ticket)
                return "drawn"
        except Cancelled:
            return "cancelled"
        except Fault:
            return "fault"
        except OutOfPages:
            assert fate == "fork", "only forks may be refused"
            return "no room to fork"


def _draw(
    family: Family,
    generation: Generation,
    seed: int,
    fate: str,
    when: int,
    ticket: Ticket,
) -> None:
    """Draw it and its twin, if it gets one, step by step beside each other."""
    scales, layers = len(family.cache.schedule), range(family.cache.geometry.layers)
    rows, both = list(range(generation.rows)), [generation]
    for scale in range(scales):
        if scale == when and fate == "fork":
            both.append(generation.fork())
        if scale == when and fate == "thinned":
            rows = [0]
            generation.keep_rows(rows)
        if generation.place.copies > 1:
            rows = [0] * ROWS
            generation.branch(ROWS)
        if scale == when and fate == "cancelled":
            ticket.cancel()
        for layer in layers:
            if scale == when and fate == "fault" and layer == layers[-1]:
                object.__setattr__(generation._runner, "observer", _raising)
            inputs, wanted = family.steps[seed, scale, layer]
            for one in both:
                out = one.attend(layer, *inputs[:, rows])
                if rows == list(range(ROWS)):
                    assert torch.equal(out, wanted), f"scale {scale}, layer {layer}: not as alone"
                else:  # torch may round other numbers of rows differently
                    assert torch.allclose(out, wanted[rows], atol=1e-2), f"scale {scale}"
    for one in both:
        one.close()


def _raising(*_: Any) -> None:
    raise Fault


def run(generations: int, progress: Progress | None, seed: int = 0) -> dict[str, Any]:
    """``generations`` of them. Raises AssertionError at the first violation."""
    soak = Soak(generations, seed, progress)
    threads = [
        threading.Thread(target=soak.work, args=[seed * THREADS + number])
        for number in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if soak.failures:
        raise soak.failures[0]
    gc.collect()
    soak.admission.check()
    soak.admission.pool.check()
    pool, stats = soak.admission.pool.stats, soak.admission.stats
    assert (pool.live_pages, pool.reserved_pages, stats.underway, stats.queued) == (0, 0, 0, 0)
    warm = np.array([one for one in soak.resident if one[0] >= WARM * generations], dtype=float)
    slope = float(np.polyfit(warm[:, 0], warm[:, 1], 1)[0]) if len(warm) > 2 else 0.0
    return {
        "generations": generations,
        "seed": seed,
        "ended": dict(sorted(soak.ended.items())),
        "waited": soak.waited,
        "violations": 0,
        "leaked_pages": 0,
        "resident_slope_bytes": slope,
        "resident_mib": soak.resident[-1][1] / 2**20,
    }
