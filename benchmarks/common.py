"""Interleaved timing and a record of what it was done on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from kvruntime import CacheGeometry, ScaleSchedule
from kvruntime.coding import Coding
from kvruntime.device import versions
from policies import TORCH_DTYPES, Profile


def interleaved(
    runs: dict[str, Callable[[], object]], repeats: int, progress: Progress | None = None
) -> dict[str, list[float]]:
    """Seconds of each run, called in turn ``repeats`` times after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    bar = progress.add_task(", ".join(runs), total=repeats + 1) if progress else None
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - began)
        if progress and bar is not None:
            progress.advance(bar)
    return times


def random_steps(
    schedule: ScaleSchedule, rows: int, heads: int, head_dim: int, dtype: str
) -> list[Tensor]:
    """q, k, v of every scale, [3, rows, n, heads, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, rows, n, heads, head_dim, generator=generator).to(TORCH_DTYPES[dtype])
        for n in schedule.tokens
    ]


def own_attention(steps: list[Tensor]) -> None:
    """One layer as models do it, torch.cat + SDPA; a step is q, k, v [3, rows, n, heads, dim]."""
    cached: list[Tensor] = []
    for step in steps:
        q, k, v = step.transpose(2, 3).unbind(0)
        if cached:
            k, v = torch.cat((cached[0], k), 2), torch.cat((cached[1], v), 2)
        cached = [k, v]
        F.scaled_dot_product_attention(q, k, v)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(top: list[float], bottom: list[float]) -> list[float]:
    """Round by round, so that a machine whose speed drifts does not matter."""
    return [a / b for a, b in zip(top, bottom, strict=True)]


def environment() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "torch_threads": torch.get_num_threads(),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return lines[0] if lines else platform.processor()
    except OSError:
        return platform.processor()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(device: torch.device, call: Callable[[], object]) -> int | None:
    """Bytes that torch held on the device at most while it ran, beyond what it held before; None
    where torch does not count them.
    """
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def seconds_of(device: torch.device, call: Callable[[], object], repeats: int) -> list[float]:
    call()
    times = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return times


def even_coding(geometry: CacheGeometry) -> Coding:
    """A coding that takes channels as they come."""
    shape = (2, geometry.layers, geometry.heads, geometry.head_dim)
    turn = torch.eye(geometry.head_dim).expand(*shape, -1)
    return Coding("even", turn, torch.zeros(shape))


def even_profile(schedule: ScaleSchedule, layers: int, heads: int, head_dim: int) -> Profile:
    """Statistics of a model whose layers and heads are all alike, and look at all scales alike."""
    zeros = np.zeros((len(schedule), layers))
    by_head = np.zeros((layers, heads))
    return Profile(
        version=2,
        model="even",
        sizes=schedule.sizes,
        pictures=1,
        selectivity=zeros.tolist(),
        similarity=zeros.tolist(),
        cached_mass=zeros.tolist(),
        mass=[
            [(by_head + 1 / (scale + 1)).tolist() for _ in range(scale + 1)]
            for scale in range(len(schedule))
        ],
        column_variance=by_head.tolist(),
        query_means=np.zeros((len(schedule), layers, heads, head_dim)).tolist(),
        fold_tokens=(1, 2),
        fold_errors=[[(by_head + error).tolist()] * len(schedule) for error in (1.0, 0.5)],
    )
