"""One layer through all 13 scales of one megapixel: torch.cat + SDPA, and ours: everything, and 650
tokens of it, by two policies; with exact and with int4 pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

from rich.progress import Progress
from torch import Tensor

from benchmarks.common import interleaved, own_attention, random_steps, ratios, spread
from kvruntime import CacheGeometry, CacheOptions, PagedKVCache, ScaleSchedule
from kvruntime.catalogue import find_model
from kvruntime.step import read
from kvruntime.step import run as step_run

BUDGET, ROWS = 650, 2
GEOMETRIES = ("infinity-125m", "infinity-2b")
DTYPES = ("float32", "bfloat16")
CASES = tuple(f"{geometry}/{dtype}" for geometry in GEOMETRIES for dtype in DTYPES)
CACHES = {
    name + (" int4" if kv_dtype else ""): (name, kv_dtype)
    for kv_dtype in (None, "int4")
    for name in ("full", "scalekv", "centroid")
}
# a step but for gathering and attention: what selection and compaction take
KEEPING = {
    name: (step_run, name) for name in ("prepare", "choose", "commit", "shift", "keep", "fold")
}
PARTS = {**KEEPING, "dequantize": (read, "dequantize")}


class Stopwatch:
    """Seconds spent in functions while it is entered. A CPU does what it is told at once.

    parts: by a name for each, the module that calls the function, and its name there.
    """

    def __init__(self, parts: Mapping[str, tuple[Any, str]] = PARTS) -> None:
        self._parts = parts

    def __enter__(self) -> Stopwatch:
        self.seconds = dict.fromkeys(self._parts, 0.0)
        self._patches = ExitStack()
        for part, (owner, name) in self._parts.items():
            timed = self._timed(part, getattr(owner, name))
            self._patches.enter_context(patch.object(owner, name, timed))
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - began
            return result

        return call


def pair_speedup(schedule: ScaleSchedule, kept: list[int]) -> float:
    """Query-key pairs with the whole history over pairs with ``kept[k]`` cached tokens after scale
    k.
    """
    full = sum(n * seen for n, seen in zip(schedule.tokens, schedule.seen, strict=True))
    ours = sum(n * (n + old) for n, old in zip(schedule.tokens, [0, *kept[:-1]], strict=True))
    return full / ours


def run(repeats: int, progress: Progress | None, only: str | None = None) -> list[dict[str, Any]]:
    """All of CASES, or one of them."""
    results = []
    for case in CASES:
        if only in (None, case):
            name, dtype = case.split("/")
            known = find_model(name)
            geometry = CacheGeometry(1, known.geometry.heads, known.geometry.head_dim, dtype, dtype)
            results.append(measure(name, geometry, known.schedule, BUDGET, repeats, progress))
    return results


def measure(
    name: str,
    geometry: CacheGeometry,
    schedule: ScaleSchedule,
    budget: int,
    repeats: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Times of one layer in one number format, round by round against torch.cat + SDPA."""
    steps = random_steps(schedule, ROWS, geometry.heads, geometry.head_dim, geometry.key_dtype)
    caches = {
        run: PagedKVCache(
            geometry,
            schedule,
            CacheOptions(policy=policy, budget=budget, kv_dtype=kv_dtype),
            softmax_scale=geometry.head_dim**-0.5,
        )
        for run, (policy, kv_dtype) in CACHES.items()
    }
    shares: dict[str, list[dict[str, float]]] = {run: [] for run in caches}

    def draw(run: str) -> None:
        shares[run].append(_generation(caches[run], steps))

    runs: dict[str, Callable[[], object]] = {"own": partial(own_attention, steps)}
    runs |= {run: partial(draw, run) for run in caches}
    times = interleaved(runs, repeats, progress)

    def share(run: str, part: str) -> list[float]:
        return [each[part] for each in shares[run][1:]]  # the first round does not count

    def speedup(run: str) -> dict[str, float]:
        return spread(ratios(times["own"], times[run]))

    def most_of_int4(part: str) -> dict[str, float]:
        """Round by round, of the run that spends most."""
        int4 = [run for run, (_, kv_dtype) in CACHES.items() if kv_dtype]
        return spread([max(each) for each in zip(*(share(run, part) for run in int4), strict=True)])

    kept = caches["scalekv"].plan(ROWS).tokens[:, 0, 0].tolist()
    return {
        "geometry": name,
        "dtype": geometry.key_dtype,
        "rows": ROWS,
        "budget_tokens": budget,
        "own_seconds": spread(times["own"]),
        "pair_speedup": pair_speedup(schedule, kept),
        "full_ratio": spread(ratios(times["full"], times["own"])),
        "scalekv_speedup": speedup("scalekv"),
        "selection_share": spread(share("scalekv", "keeping")),
        "centroid_speedup": speedup("centroid"),
        "fold_share": spread(share("centroid", "keeping")),
        "full_int4_ratio": spread(ratios(times["full int4"], times["own"])),
        "scalekv_int4_speedup": speedup("scalekv int4"),
        "selection_int4_share": spread(share("scalekv int4", "keeping")),
        "centroid_int4_speedup": speedup("centroid int4"),
        "fold_int4_share": spread(share("centroid int4", "keeping")),
        "dequantize_share": most_of_int4("dequantize"),
        "dequantize_worst_step_share": most_of_int4("dequantize_worst_step"),
    }


def _generation(cache: PagedKVCache, steps: list[Tensor]) -> dict[str, float]:
    """Draw; what part of the steps' time went where."""
    with cache.open(ROWS) as generation, Stopwatch() as watch:
        seconds, by_step = 0.0, []
        for step in steps:
            before, began = watch.seconds["dequantize"], time.perf_counter()
            generation.attend(0, *step)
            elapsed = time.perf_counter() - began
            seconds += elapsed
            by_step.append((watch.seconds["dequantize"] - before) / elapsed)
    return {
        "keeping": sum(watch.seconds[part] for part in KEEPING) / seconds,
        "dequantize": watch.seconds["dequantize"] / seconds,
        "dequantize_worst_step": max(by_step),
    }
