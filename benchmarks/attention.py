"""One layer through all 13 scales of one megapixel: torch.cat + SDPA, ours in full, ours at 650
tokens, both with exact and with int4 pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from rich.progress import Progress

import kvruntime.pool
from benchmarks.common import interleaved, own_attention, ratios, spread
from kvruntime import PagedKVCache
from kvruntime.catalogue import find_model
from kvruntime.executor import Executor
from kvruntime.pool import TORCH_DTYPES
from kvruntime.scheduler import Scheduler
from policies import CacheGeometry, ScaleKV, ScaleSchedule

BUDGET, ROWS = 650, 2
GEOMETRIES = ("infinity-125m", "infinity-2b")
DTYPES = ("float32", "bfloat16")


PARTS = {
    "move": (Scheduler, "move"),  # the host's part of selection and compaction
    "select": (ScaleKV, "select"),
    "store_known": (Executor, "_store_known"),
    "store_chosen": (Executor, "_store_chosen"),
    "dequantize": (kvruntime.pool, "dequantize"),
}


class _Stopwatch:
    """Seconds spent in PARTS while it is entered. A CPU does what it is told at once."""

    def __enter__(self) -> _Stopwatch:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._patches = ExitStack()
        for name, (owner, method) in PARTS.items():
            timed = self._timed(name, getattr(owner, method))
            self._patches.enter_context(patch.object(owner, method, timed))
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - began
            return result

        return call


def pair_speedup(schedule: ScaleSchedule, kept: list[int]) -> float:
    """Query-key pairs with the whole history over pairs with ``kept[k]`` cached tokens after scale
    k.
    """
    full = sum(n * seen for n, seen in zip(schedule.tokens, schedule.seen, strict=True))
    ours = sum(n * (n + old) for n, old in zip(schedule.tokens, [0, *kept[:-1]], strict=True))
    return full / ours


def run(repeats: int, progress: Progress | None) -> list[dict[str, Any]]:
    return [_one(name, dtype, repeats, progress) for name in GEOMETRIES for dtype in DTYPES]


def _one(name: str, dtype: str, repeats: int, progress: Progress | None) -> dict[str, Any]:
    known = find_model(name)
    schedule = known.schedule
    geometry = CacheGeometry(1, known.geometry.heads, known.geometry.head_dim, dtype, dtype)
    torch.manual_seed(0)
    steps = [
        torch.randn(3, ROWS, n, geometry.heads, geometry.head_dim).to(TORCH_DTYPES[dtype])
        for n in schedule.tokens
    ]

    caches = {
        name: PagedKVCache(geometry, schedule, policy, BUDGET, kv_dtype=kv_dtype)
        for name, policy, kv_dtype in (
            ("full", "full", None),
            ("scalekv", "scalekv", None),
            ("full int4", "full", "int4"),
            ("scalekv int4", "scalekv", "int4"),
        )
    }
    shares: dict[str, list[dict[str, float]]] = {cache: [] for cache in caches}

    def paged(name: str) -> None:
        with caches[name].open(ROWS) as cache, _Stopwatch() as watch:
            seconds, by_step = 0.0, []
            for step in steps:
                before, began = watch.seconds["dequantize"], time.perf_counter()
                cache.attend(0, *step)
                elapsed = time.perf_counter() - began
                seconds += elapsed
                by_step.append((watch.seconds["dequantize"] - before) / elapsed)
        compaction = sum(watch.seconds[part] for part in PARTS if part != "dequantize")
        shares[name].append(
            {
                "selection": compaction / seconds,
                "dequantize": watch.seconds["dequantize"] / seconds,
                "dequantize_worst_step": max(by_step),
                "dequantize_last_step": by_step[-1],
            }
        )

    runs: dict[str, Callable[[], object]] = {"own": partial(own_attention, steps)}
    runs |= {cache: partial(paged, cache) for cache in caches}
    times = interleaved(runs, repeats, progress)
    lengths = caches["scalekv"].plan(ROWS).lengths[:, 0, 0].tolist()
    allowed = pair_speedup(schedule, lengths)
    report: dict[str, Any] = {
        "geometry": name,
        "dtype": dtype,
        "rows": ROWS,
        "budget_tokens": BUDGET,
        "own_seconds": spread(times["own"]),
        "pair_speedup": allowed,
    }
    for cache in caches:
        plan = caches[cache].plan(ROWS)
        report[cache] = {
            "kv_start": plan.page_format["kv_start"],
            "speedup": spread(ratios(times["own"], times[cache])),
            "time_ratio": spread(ratios(times[cache], times["own"])),
            "page_bytes": plan.page_bytes,
            **{
                f"{part}_share": spread([share[part] for share in shares[cache][1:]])
                for part in shares[cache][0]
            },
        }
    return report
