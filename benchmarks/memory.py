"""Bytes of the tensors that the runtime itself allocates, from torch.profiler's memory events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from kvruntime import PagedKVCache

SCOPE = "kvruntime"
KERNEL = "aten::scaled_dot_product_attention"  # its buffers and output are the model's own as well


def peak_allocated_bytes(draw: Callable[[], object]) -> int:
    """Most bytes alive at once of what PagedKVCache.open and attend allocate while ``draw`` runs.

    What the attention kernel allocates inside is left out: the model's own cache calls the same
    one.
    """
    methods = {name: _scoped(getattr(PagedKVCache, name)) for name in ("open", "attend")}
    with patch.multiple(PagedKVCache, **methods):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            draw()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    changes = sorted(
        (when, size, address, ours)
        for event in results.experimental_event_tree()
        for when, size, address, ours in _allocations(event, False)
    )
    alive: dict[int, int] = {}
    now = peak = 0
    for _, size, address, ours in changes:
        if size < 0:
            now -= alive.pop(address, 0)
        elif ours:
            alive[address] = size
            now += size
            peak = max(peak, now)
    return peak


def _scoped(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(SCOPE):
            return method(*args, **kwargs)

    return call


def _allocations(event: Any, ours: bool) -> Iterator[tuple[int, int, int, bool]]:
    """(time, bytes, address, ours) of every allocation and, with negative bytes, release."""
    if event.tag == _EventType.Allocation:
        fields = event.extra_fields
        yield event.start_time_ns, fields.alloc_size, fields.ptr, ours
    if event.name == SCOPE:
        ours = True
    elif event.name == KERNEL:
        ours = False
    for child in event.children:
        yield from _allocations(child, ours)
