"""How many rows fit under a cap on KV bytes: a cache that concatenates, as models have their own,
and ours, each drawn to the end at that number.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from benchmarks.common import random_steps
from benchmarks.memory import peak_allocated_bytes
from kvruntime import CacheOptions, PagedKVCache, Pool, WillNeverFit
from kvruntime.catalogue import Model, find_model

MODEL, RESOLUTION, OWN_ROWS = "infinity-125m", "0.25M", 1
POLICIES: dict[str, tuple[str, float | str, str | None]] = {
    "full": ("full", 1.0, None),
    "ams_kv 10 %": ("ams_kv", 0.10, None),
    "scalekv 10 %": ("scalekv", 0.10, None),
    "centroid 10 %": ("centroid", 0.10, None),
    "centroid int4 2 %": ("centroid", "2%", "int4"),
}


class OwnCache:
    """Keys and values of all scales, one tensor a layer, longer with every scale."""

    def __init__(self, layers: int) -> None:
        self._held: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """keys, values: [rows, n, heads, head_dim] of a scale."""
        held = self._held[layer]
        if held is None:
            self._held[layer] = keys.clone(), values.clone()
        else:
            self._held[layer] = None  # as a module does that assigns one after the other
            kept_keys, kept_values = held
            del held
            longer = torch.cat([kept_keys, keys], dim=1)
            del kept_keys
            self._held[layer] = longer, torch.cat([kept_values, values], dim=1)


def own_bytes(model: Model, rows: int) -> int:
    """Most bytes that an own cache of so many rows has allocated at once."""
    layers = model.geometry.layers
    steps = _steps(model, rows)

    def draw() -> None:
        cache = OwnCache(layers)
        for _, keys, values in steps:
            for layer in range(layers):
                cache.append(layer, keys, values)

    return peak_allocated_bytes(draw, ((OwnCache, "append"),))


def _steps(model: Model, rows: int) -> list[Tensor]:
    geometry = model.geometry
    return random_steps(model.schedule, rows, geometry.heads, geometry.head_dim, geometry.key_dtype)


def run(progress: Progress, own_rows: int = OWN_ROWS) -> dict[str, Any]:
    """The cap is what ``own_rows`` rows of the own cache take."""
    model = find_model(MODEL, RESOLUTION)
    bar = progress.add_task("drawing", total=1 + len(POLICIES))
    cap = own_bytes(model, own_rows)
    progress.advance(bar)
    fits = []
    for name in POLICIES:
        fits.append({"policy": name, **most_rows(model, cap, POLICIES[name], own_rows)})
        progress.advance(bar)
    return {
        "model": MODEL,
        "resolution": RESOLUTION,
        "cap_bytes": cap,
        "own_rows": own_rows,
        "own_planned_bytes": _planned_own(model, own_rows),
        "fits": fits,
    }


def _planned_own(model: Model, rows: int) -> int:
    cache = PagedKVCache(model.geometry, model.schedule, softmax_scale=1.0)
    return cache.plan(rows).baseline_bytes()["with_cat_copy_bytes"]


def most_rows(
    model: Model, cap: int, policy: tuple[str, float | str, str | None], own_rows: int
) -> dict[str, Any]:
    """Rows that a pool of so many bytes holds, drawn; one more is refused."""
    name, budget, kv_dtype = policy
    options = CacheOptions(name, budget, kv_dtype=kv_dtype)
    alone = PagedKVCache(model.geometry, model.schedule, options, softmax_scale=1.0)
    pool = Pool(cap, page_bytes=alone.page_bytes, plane_bytes=alone.plane_bytes)
    cache = PagedKVCache(model.geometry, model.schedule, options, softmax_scale=1.0, pool=pool)
    row_pages = cache.plan(1).peak_pages
    planned = pool.num_pages // row_pages
    steps = _steps(model, planned)
    with cache.open(planned) as generation:
        for step in steps:
            for layer in range(model.geometry.layers):
                generation.attend(layer, *step)
        used = generation.stats.peak_pages
    try:
        cache.open(planned + 1).close()
    except WillNeverFit:
        pass
    else:
        raise AssertionError(f"{name}: {planned + 1} rows were let in")
    each = pool.page_bytes + pool.plane_bytes
    return {
        "rows": planned,
        "times_own": planned / own_rows,
        "used_bytes": used * each,
        "planned_bytes": cache.plan(planned).page_bytes,
    }
