"""Bytes of the tensors that the runtime itself allocates, from torch.profiler's memory events,
beside what the plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from rich.progress import Progress
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import even_coding, even_profile, random_steps
from benchmarks.ragged import RAGGED
from kvruntime import CacheGeometry, CacheOptions, Generation, PagedKVCache, Policy, ScaleSchedule
from policies import POLICY_NAMES, make_policy

FORMATS = (None, "int4", "coded3")
POLICIES = (*POLICY_NAMES, *(policy.name for policy in RAGGED))
LEAST = 0.95  # of the planned bytes, that a generation needs; and never more than them
SCOPE = "kvruntime"
KERNEL = "aten::scaled_dot_product_attention"  # its buffers and output are the model's own as well
SCOPED = ((PagedKVCache, "open"), (Generation, "attend"))


@dataclass(frozen=True, slots=True)
class Sizes:
    """A generation whose pages and workspace are of similar size."""

    schedule: ScaleSchedule
    rows: int
    layers: int
    heads: int
    head_dim: int
    budget: float
    dtypes: tuple[str, ...]


FULL = Sizes(
    ScaleSchedule.of([1, 2, 4, 8, 16, 24]), 4, 6, 4, 64, 0.4, ("float32", "bfloat16", "float16")
)
TINY = Sizes(ScaleSchedule.of([1, 2, 4, 8, 12]), 2, 6, 4, 64, 0.4, ("bfloat16",))


def run(
    progress: Progress | None, policies: tuple[str, ...] = (), sizes: Sizes | None = None
) -> list[dict[str, Any]]:
    """Measured against planned bytes: every policy and the ragged ones, in all FORMATS, all rows
    at once and one at a time. policies: names of some; none are all.
    """
    sizes = sizes or FULL
    profile = even_profile(sizes.schedule, sizes.layers, sizes.heads, sizes.head_dim)
    known = {name: make_policy(name, profile) for name in POLICY_NAMES}
    known |= {policy.name: policy for policy in RAGGED}
    chosen = [known[name] for name in policies or POLICIES]
    cases = [
        (policy, dtype, kv_dtype, chunks)
        for policy in chosen
        for dtype in sizes.dtypes
        for kv_dtype in FORMATS
        for chunks in (1, sizes.rows)
    ]
    bar = progress.add_task("measuring", total=len(cases)) if progress else None
    results = []
    for policy, dtype, kv_dtype, chunks in cases:
        results.append(measure(sizes, policy, dtype, kv_dtype, chunks))
        if progress and bar is not None:
            progress.advance(bar)
    return results


def measure(
    sizes: Sizes, policy: Policy, dtype: str, kv_dtype: str | None, chunks: int
) -> dict[str, Any]:
    """One generation, its first: the pool and the workspace are made in it."""
    geometry = CacheGeometry(sizes.layers, sizes.heads, sizes.head_dim, dtype, dtype)
    cache = PagedKVCache(
        geometry,
        sizes.schedule,
        CacheOptions(
            policy=policy,
            budget=sizes.budget,
            kv_dtype=kv_dtype,
            coding=even_coding(geometry),
            workspace=1 if chunks > 1 else 2**40,
        ),
        softmax_scale=sizes.head_dim**-0.5,
    )
    plan = cache.plan(sizes.rows)
    assert plan.rows // plan.chunk_rows == chunks
    steps = random_steps(sizes.schedule, sizes.rows, sizes.heads, sizes.head_dim, dtype)

    def draw() -> None:
        with cache.open(sizes.rows) as generation:
            for step in steps:
                for layer in range(sizes.layers):
                    generation.attend(layer, *step)

    measured = peak_allocated_bytes(draw)
    return {
        "policy": policy.name,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "chunks": chunks,
        "ragged": policy in RAGGED,
        "page_bytes": plan.page_bytes,
        "workspace_bytes": plan.workspace_bytes,
        "planned_bytes": plan.total_bytes,
        "measured_bytes": measured,
        "ratio": measured / plan.total_bytes,
    }


def peak_allocated_bytes(
    draw: Callable[[], object], scopes: tuple[tuple[type, str], ...] = SCOPED
) -> int:
    """Most bytes alive at once of what these methods allocate while ``draw`` runs; without
    ``scopes`` PagedKVCache.open and Generation.attend.

    What the attention kernel allocates inside is left out: the model's own cache calls the same
    one.
    """
    now = peak = 0
    for _, size, _ in allocations(draw, scopes):
        now += size
        peak = max(peak, now)
    return peak


def allocations(
    draw: Callable[[], object], scopes: tuple[tuple[type, str], ...] = SCOPED
) -> list[tuple[int, int, str]]:
    """(time, bytes, operator) of what these methods allocate while ``draw`` runs, and, with
    negative bytes, of their releases, in order. scopes: the runtime's own.
    """
    with ExitStack() as stack:
        for owner, name in scopes:
            stack.enter_context(_scoped(owner, name))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            draw()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    changes = sorted(
        change
        for event in results.experimental_event_tree()
        for change in _changes(event, False, event.name)
    )
    alive: dict[int, int] = {}
    ours = []
    for when, size, address, is_ours, name in changes:
        if size < 0 and address in alive:
            ours.append((when, -alive.pop(address), name))
        elif size > 0 and is_ours:
            alive[address] = size
            ours.append((when, size, name))
    return ours


def _scoped(owner: type, name: str) -> Any:
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(SCOPE):
            return method(*args, **kwargs)

    return patch.object(owner, name, call)


def _changes(event: Any, ours: bool, name: str) -> Iterator[tuple[int, int, int, bool, str]]:
    """(time, bytes, address, ours, operator) of every allocation and, with negative bytes,
    release.
    """
    if event.tag == _EventType.Allocation:
        fields = event.extra_fields
        yield event.start_time_ns, fields.alloc_size, fields.ptr, ours, name
    else:
        name = event.name
    if event.name == SCOPE:
        ours = True
    elif event.name == KERNEL:
        ours = False
    for child in event.children:
        yield from _changes(child, ours, name)
