"""Everything about a CUDA device at once: right results on every path, times, memory, bandwidth.

The same code runs on a CPU under Triton's interpreter, in miniature, which is how it is tested.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress

import kvruntime
from benchmarks.common import (
    interleaved,
    own_attention,
    peak_of,
    ratios,
    seconds_of,
    spread,
    synchronise,
)
from benchmarks.correctness import backends, correctness, filled_pool, gather_pages
from benchmarks.gpu_sizes import FULL, Sizes
from benchmarks.gpu_tiles import held_lanes, tiles
from kvruntime import BackendUnavailable, CacheOptions, PagedKVCache, Stats
from kvruntime.attention import reasons_against_xformers
from kvruntime.catalogue import find_model
from kvruntime.demo import demo_labels
from kvruntime.planning import max_rows, plan
from kvruntime.reference import load_model
from kvruntime.storage.layout import RecordFormat
from kvruntime.storage.memory import free_bytes
from kvruntime.storage.pages import Pages
from policies import TORCH_DTYPES, CacheGeometry

PLAN_FOR_A_CPU = find_model("emoji64").with_dtypes("float16", "float16")


def run(
    repeats: int,
    progress: Progress | None,
    device: torch.device | str = "cuda",
    sizes: Sizes = FULL,
) -> dict[str, Any]:
    """All of it. ``device`` must be able to run the xformers back end."""
    device = torch.device(device)
    made = plan("var-d16" if device.type == "cuda" else PLAN_FOR_A_CPU)
    reasons = reasons_against_xformers(device, made)
    if reasons:
        raise BackendUnavailable("xformers", reasons)
    correct = correctness(
        device, sizes.dtypes, sizes.head_dims, sizes.page_sizes, sizes.kv_groups, sizes.queries
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "correctness": correct,
        "all_correct": all(case["error"] <= case["bound"] for case in correct),
        "bandwidth": bandwidth(device, sizes, repeats),
        "crossover": crossover(device, sizes, repeats),
        "tiles": tiles(device, sizes, repeats),
        "attention": attention(device, sizes, repeats, progress),
        "generate": generate(device, sizes, repeats, progress),
    }


def bandwidth(device: torch.device, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Bytes a second of gathering pages, beside a copy of as many bytes on the device."""
    dtype, head_dim, page_size = sizes.dtypes[-1], sizes.head_dims[-1], 64
    page_bytes = page_size * head_dim * 4  # K and V, two bytes a number
    num = max(8, sizes.copied_bytes // page_bytes)
    report: dict[str, Any] = {"bytes": num * page_bytes}
    source = torch.empty(num * page_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = statistics.median(seconds_of(device, lambda: target.copy_(source), repeats))
    report["copy_bytes_per_second"] = num * page_bytes / copied
    ids = torch.randperm(num, device=device).view(1, 4, -1)[:, :, : num // 4]
    shape = (1, 4, ids.shape[2] * page_size, head_dim)
    keys, values = torch.empty((2, *shape), dtype=TORCH_DTYPES[dtype], device=device)
    for name, records in (("exact", None), ("int4", RecordFormat(4))):
        pages = filled_pool(device, dtype, head_dim, page_size, records, num)

        def gather(pages: Pages = pages) -> None:
            gather_pages(pages, ids, keys, values)

        seconds = statistics.median(seconds_of(device, gather, repeats))
        report[f"{name}_gather_bytes_per_second"] = num * page_bytes / seconds
        report[f"{name}_gather_over_copy"] = copied / seconds
    return report


def crossover(device: torch.device, sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """Reading pages against gathering for the queries of each scale: tells where paged_queries
    belongs.
    """
    return [
        _crossing(device, sizes, repeats, records, cached, n)
        for records in (None, RecordFormat(4))
        for cached in (sizes.budget, sizes.schedule.history)
        for n in sizes.schedule.tokens
    ]


def _crossing(
    device: torch.device,
    sizes: Sizes,
    repeats: int,
    records: RecordFormat | None,
    cached: int,
    n: int,
) -> dict[str, Any]:
    dtype, head_dim = sizes.dtypes[-1], sizes.head_dims[-1]
    backend = backends(device, dtype, head_dim)["xformers"]
    held, (q, k, v) = held_lanes(device, sizes, records, cached, n)
    tables, places = held.tables, held.tables.shape[1] * held.pages.page_size
    rows, heads = q.shape[0], q.shape[2]
    room = (2, rows, heads, places + n, head_dim)
    workspace = torch.empty(room, dtype=q.dtype, device=device)
    keys, values = workspace[:, :, :, : cached + n]

    def paged() -> None:
        backend.attend_pages(q, k, v, held, 0.1)

    def gathered() -> None:
        gather_pages(held.pages, tables.view(rows, heads, -1), *workspace)
        keys[:, :, cached:] = k.transpose(1, 2)
        values[:, :, cached:] = v.transpose(1, 2)
        backend.attend(q, keys, values, None, 0.1)

    return {
        "kv_dtype": records.name if records else None,
        "cached_tokens": cached,
        "queries": n,
        "paged_seconds": spread(seconds_of(device, paged, repeats)),
        "gathered_seconds": spread(seconds_of(device, gathered, repeats)),
    }


def attention(
    device: torch.device, sizes: Sizes, repeats: int, progress: Progress | None
) -> dict[str, Any]:
    """One layer through all scales: torch.cat + SDPA against both back ends, exact and int4."""
    dtype, head_dim = sizes.dtypes[-1], sizes.head_dims[-1]
    heads, rows = sizes.heads, 2
    geometry = CacheGeometry(1, heads, head_dim, dtype, dtype)
    steps = [
        torch.randn(3, rows, n, heads, head_dim, device=device).to(TORCH_DTYPES[dtype])
        for n in sizes.schedule.tokens
    ]

    last: dict[PagedKVCache, Stats] = {}

    def own() -> None:
        own_attention(steps)
        synchronise(device)

    def paged(cache: PagedKVCache) -> Callable[[], None]:
        def call() -> None:
            with cache.open(rows) as generation:
                for step in steps:
                    generation.attend(0, *step)
            synchronise(device)
            last[cache] = generation.stats

        return call

    runs: dict[str, Callable[[], object]] = {"own": own}
    caches = {}
    for policy in sizes.policies:
        for kv_dtype in (None, "int4"):
            for backend in ("sdpa", "xformers"):
                name = f"{policy} {kv_dtype or dtype} {backend}"
                caches[name] = PagedKVCache(
                    geometry,
                    sizes.schedule,
                    CacheOptions(
                        policy=policy,
                        budget=sizes.budget,
                        page_size=64,
                        kv_dtype=kv_dtype,
                        backend=backend,
                    ),
                    softmax_scale=head_dim**-0.5,
                    device=device,
                )
                runs[name] = paged(caches[name])
    times = interleaved(runs, repeats, progress)
    report: dict[str, Any] = {"own_seconds": spread(times["own"])}
    for name, cache in caches.items():
        report[name] = {
            "time_ratio": spread(ratios(times[name], times["own"])),
            "page_steps": last[cache].page_steps,
            "gather_steps": last[cache].gather_steps,
            **_memory(device, cache, runs[name]),
        }
    return report


def _memory(
    device: torch.device, cache: PagedKVCache, draw: Callable[[], object]
) -> dict[str, Any]:
    """Bytes that torch held at the peak of a generation beyond what it held before, and planned
    ones. What attention itself allocates is in the first and not in the second.
    """
    planned = cache.plan(2).total_bytes
    cache.let_go()
    return {"planned_bytes": planned, "peak_allocated_bytes": peak_of(device, draw)}


def generate(
    device: torch.device, sizes: Sizes, repeats: int, progress: Progress | None
) -> dict[str, Any]:
    """The bundled model's pictures on its own cache and on ours; and how many rows of a large model
    the plan puts into this device's free memory.
    """
    dtype = sizes.dtypes[-1]
    model = load_model(TORCH_DTYPES[dtype]).to(device)
    labels = demo_labels(sizes.pictures).to(device)

    def draw() -> None:
        model.generate(labels)
        synchronise(device)

    report: dict[str, Any] = {"own_seconds": spread(interleaved({"": draw}, repeats, progress)[""])}
    for policy in sizes.policies:
        for kv_dtype in (None, "int4"):
            with kvruntime.attach(
                model, policy, 0.10, kv_dtype=kv_dtype, page_size=64, backend=sizes.backend
            ) as cache:
                seconds = interleaved({"": draw}, repeats, progress)[""]
                stats = cache.stats
            report[f"{policy} {kv_dtype or dtype}"] = {
                "seconds": spread(seconds),
                "backend": stats.backend,
                "backend_reason": stats.backend_reason,
                "planned_pages": stats.planned_pages,
                "peak_pages": stats.peak_pages,
            }
    made = plan("infinity-8b", 1, "scalekv", 650, kv_dtype="int4")
    report["infinity_8b_rows_in_free_memory"] = max_rows(made, free_bytes(device))
    return report
