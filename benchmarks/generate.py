"""The bundled model's whole pictures: its own cache, ours in full, ours at 10 %."""

from __future__ import annotations

import statistics
from collections.abc import Callable
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
    model = load_model(torch.float32)
    labels = demo_labels(PICTURES)
    allocated: dict[str, float] = {}

    def own() -> None:
        model.generate(labels)

    def attached(policy: str) -> Callable[[], None]:
        def draw() -> None:
            with kvruntime.attach(model, policy, 0.10):
                model.generate(labels)

        return draw

    policies = ("full", "scalekv")
    for policy in policies:
        with kvruntime.attach(model, policy, 0.10) as cache:
            peak = peak_allocated_bytes(own)
            allocated[policy] = peak / (cache.stats.page_bytes + cache.stats.workspace_bytes)
    times = interleaved(
        {"own": own, **{policy: attached(policy) for policy in policies}}, repeats, progress
    )
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
