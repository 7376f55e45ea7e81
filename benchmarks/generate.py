"""The bundled model's whole pictures: its own cache, ours in full, ours at 10 % by two policies.

A copy of the model for each, attached throughout: pools are made before the clock starts.
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
POLICIES = ("full", "scalekv", "centroid")


def run(repeats: int, progress: Progress | None, pictures: int = PICTURES) -> dict[str, Any]:
    labels = demo_labels(pictures)
    allocated: dict[str, float] = {}
    model = load_model(torch.float32)
    draws: dict[str, Callable[[], object]] = {"own": lambda: model.generate(labels)}
    with ExitStack() as attached:
        for policy in POLICIES:
            other = load_model(torch.float32)
            cache = attached.enter_context(kvruntime.attach(other, policy, 0.10))
            draws[policy] = partial(other.generate, labels)
            peak = peak_allocated_bytes(draws[policy])
            allocated[policy] = peak / (cache.stats.page_bytes + cache.stats.workspace_bytes)
        times = interleaved(draws, repeats, progress)
    report: dict[str, Any] = {
        "pictures": pictures,
        "dtype": "float32",
        "own_seconds": spread(times["own"]),
        "allocated_over_plan": allocated,
    }
    for policy in POLICIES:
        values = ratios(times[policy], times["own" if policy == "full" else "full"])
        report[f"{policy}_ratio"] = statistics.median(values)
        report[f"{policy}_ratio_spread"] = spread(values)
    return report
