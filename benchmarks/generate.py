"""The bundled model's whole pictures: its own cache, ours in full, ours at 10 %.

Three copies of the model, two of them attached throughout: pools are made before the clock starts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

import kvruntime
from benchmarks.common import interleaved, ratios, spread
from benchmarks.memory import peak_allocated_bytes
from kvruntime.demo import demo_labels
from kvruntime.reference import load_model

PICTURES = 16


def run(repeats: int, progress: Progress | None) -> dict[str, Any]:
    labels = demo_labels(PICTURES)
    allocated: dict[str, float] = {}
    model = load_model(torch.float32)
    draws: dict[str, Callable[[], object]] = {"own": lambda: model.generate(labels)}
    with ExitStack() as attached:
        for policy in ("full", "scalekv"):
            other = load_model(torch.float32)
            cache = attached.enter_context(kvruntime.attach(other, policy, 0.10))
            draws[policy] = partial(other.generate, labels)
            peak = peak_allocated_bytes(draws[policy])
            allocated[policy] = peak / (cache.stats.page_bytes + cache.stats.workspace_bytes)
        times = interleaved(draws, repeats, progress)
    full = ratios(times["full"], times["own"])
    scalekv = ratios(times["scalekv"], times["full"])
    return {
        "pictures": PICTURES,
        "dtype": "float32",
        "own_seconds": spread(times["own"]),
        "full_ratio": statistics.median(full),
        "full_ratio_spread": spread(full),
        "scalekv_ratio": statistics.median(scalekv),
        "scalekv_ratio_spread": spread(scalekv),
        "allocated_over_plan": allocated,
    }
