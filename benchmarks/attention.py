"""One layer through all 13 scales of one megapixel: torch.cat + SDPA, ours in full, ours at 650
tokens.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from benchmarks.common import interleaved, ratios, spread
from kvruntime import PagedKVCache
from kvruntime.catalogue import find_model
from kvruntime.pool import TORCH_DTYPES
from policies import CacheGeometry, ScaleSchedule

BUDGET, ROWS = 650, 2
GEOMETRIES = ("infinity-125m", "infinity-2b")
DTYPES = ("float32", "bfloat16")


class _TimedCache(PagedKVCache):
    """Counts the seconds of selection and compaction."""

    compress_seconds = 0.0

    def _compress(self, *args: Any) -> None:
        began = time.perf_counter()
        super()._compress(*args)
        self.compress_seconds += time.perf_counter() - began


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

    def own() -> None:
        cached: list[Tensor] = []
        for step in steps:
            q, k, v = step.transpose(2, 3).unbind(0)
            if cached:
                k, v = torch.cat((cached[0], k), 2), torch.cat((cached[1], v), 2)
            cached = [k, v]
            F.scaled_dot_product_attention(q, k, v)

    caches = {
        "full": _TimedCache(geometry, schedule, "full", 1.0),
        "scalekv": _TimedCache(geometry, schedule, "scalekv", BUDGET),
    }

    def paged(cache: PagedKVCache) -> None:
        with cache.open(ROWS):
            for q, k, v in steps:
                cache.attend(0, q, k, v)

    times = interleaved(
        {
            "own": own,
            "full": lambda: paged(caches["full"]),
            "scalekv": lambda: paged(caches["scalekv"]),
        },
        repeats,
        progress,
    )
    lengths = caches["scalekv"].plan(ROWS).lengths[:, 0, 0].tolist()
    allowed = pair_speedup(schedule, lengths)
    full, speedup = ratios(times["full"], times["own"]), ratios(times["own"], times["scalekv"])
    compress = caches["scalekv"].compress_seconds / (repeats + 1)
    return {
        "geometry": name,
        "dtype": dtype,
        "rows": ROWS,
        "budget_tokens": BUDGET,
        "own_seconds": spread(times["own"]),
        "full_ratio": statistics.median(full),
        "full_ratio_spread": spread(full),
        "scalekv_speedup": statistics.median(speedup),
        "scalekv_speedup_spread": spread(speedup),
        "pair_speedup": allowed,
        "share_of_pair_speedup": statistics.median(speedup) / allowed,
        "selection_share": compress / statistics.median(times["scalekv"]),
    }
