"""Whole pictures of Infinity at one megapixel, on its authors' code: its own cache, ours by three
policies, and the authors' released ScaleKV if a checkout of it is given.

Random weights and text; the picture is not decoded, which would be the same for all. Attaching
counts.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import kvruntime
from benchmarks.common import interleaved, peak_of, ratios, spread, synchronise
from kvruntime.catalogue import find_model, infinity_schedule
from kvruntime.models import Built, build
from kvruntime.models.infinity import SIZES
from policies import TORCH_DTYPES

_RELEASED_LAYERS = 32  # those of 2B, whose budgets its code reads
CASES: dict[str, tuple[str, float | str, dict[str, Any]]] = {
    "full": ("full", 1.0, {}),
    "scalekv": ("scalekv", 0.10, {}),
    "centroid": ("centroid", "2%", {"kv_dtype": "int4"}),
}


def run(
    repeats: int,
    progress: Progress | None,
    repo: Path,
    released: Path | None = None,
    dtype: str = "bfloat16",
    resolution: str = "1M",
    model: str = "infinity-125m",
    depth: int | None = None,
    pictures: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """repo: a checkout of FoundationVision/Infinity. released: one of StargazerX0/ScaleKV. depth:
    fewer layers than the model has.
    Raises ValueError for a model, or a number of layers, that there is not.
    """
    device, layers = torch.device(device), _layers_of(model, depth, released is not None)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Infinity compiles its norms
    chosen: dict[str, Any] = {"device": device, "dtype": TORCH_DTYPES[dtype], "depth": depth}
    built = build(model, repo, stand_ins=True, **chosen)
    built.vae.decode = lambda codes: codes.new_zeros(codes.shape[0], 3, 1, 1)

    def draw() -> None:
        built.draw(pictures, 0, schedule=infinity_schedule(resolution))
        synchronise(device)

    draws: dict[str, Callable[[], object]] = {"own": draw}
    found: dict[str, kvruntime.Stats] = {}
    for name, case in CASES.items():
        draws[name] = partial(_attached, built, draw, name, case, found)
    if released is not None:
        draws["released"] = partial(_released, built, draw, released)
    peaks: dict[str, int | None] = {}

    def watched(name: str, one: Callable[[], object]) -> None:
        if name in peaks:
            one()
        else:  # in the round that is not timed
            peaks[name] = peak_of(device, one)

    runs = {name: partial(watched, name, one) for name, one in draws.items()}
    times = interleaved(runs, repeats, progress)
    report: dict[str, Any] = {
        "model": model,
        "layers": layers,
        "pictures": pictures,
        "device": device.type,
        "dtype": dtype,
        "resolution": resolution,
        "seconds": {name: spread(values) for name, values in times.items()},
        "times_faster_than_own": {},
        "scalekv_times_faster_than_released": None,
        "held_of_history": {
            name: stats.page_bytes / stats.history_bytes for name, stats in found.items()
        },
        "planned_bytes": {
            name: stats.page_bytes + stats.workspace_bytes for name, stats in found.items()
        },
        "baseline_bytes": found["full"].baseline_bytes,
        "peak_allocated_bytes": peaks,
        "planned_is_peak": all(one.planned_pages == one.peak_pages for one in found.values()),
    }
    for name in draws:
        if name != "own":
            faster = ratios(times["own"], times[name])
            report["times_faster_than_own"][name] = spread(faster)
    if released is not None:
        faster = ratios(times["released"], times["scalekv"])
        report["scalekv_times_faster_than_released"] = spread(faster)
    return report


def _layers_of(model: str, depth: int | None, is_beside_released: bool) -> int:
    """Layers that are drawn through. Raises ValueError for a model, or a number of them, that there
    is not, and for more than the released code has budgets for.
    """
    if model not in SIZES:
        raise ValueError(f"{model!r} is not one of {', '.join(SIZES)}")
    most = find_model(model).geometry.layers
    layers = depth or most
    if layers > most:
        raise ValueError(f"{model} has {most} layers, depth is {depth}")
    if is_beside_released and layers > _RELEASED_LAYERS:
        raise ValueError(
            f"the released budgets are for {_RELEASED_LAYERS} layers, here are {layers}"
        )
    return layers


def _attached(
    built: Built,
    draw: Callable[[], object],
    name: str,
    case: tuple[str, float | str, dict[str, Any]],
    found: dict[str, kvruntime.Stats],
) -> None:
    policy, budget, options = case
    with kvruntime.attach(built.model, policy, budget, **options) as cache:
        draw()
    found[name] = cache.stats


def _released(built: Built, draw: Callable[[], object], repo: Path) -> None:
    """The authors' patch of every attention, with the budgets of their file for 2B, whose first
    layers stand for these.
    """
    sys.path.insert(0, str(repo))
    try:
        code = importlib.import_module("enable_scale_kv_2b")
    finally:
        sys.path.remove(str(repo))
    with _patched_by(code, built, repo), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw()


@contextmanager
def _patched_by(code: Any, built: Built, repo: Path) -> Iterator[None]:
    with contextlib.chdir(repo):  # it reads its budgets from there
        code.enable_scale_kv(
            built.model, window_size=16, max_capacity=650, kernel_size=5, pooling="maxpool"
        )
    try:
        yield
    finally:
        for block in built.model.unregistered_blocks:  # type: ignore[union-attr]
            del block.sa.forward, block.sa._original_forward, block.sa.kv_cluster
