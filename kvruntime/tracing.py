"""Ranges that a trace of torch.profiler shows, in Perfetto or chrome://tracing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

PHASES = ("prepare", "read", "attend", "select", "commit")
PREFIX = "kvruntime::"
_NOTHING = nullcontext()


def phase(name: str) -> AbstractContextManager[object]:
    """The range of a phase of a step; nothing while no profiler runs, since opening one takes 9
    us.
    """
    if profiler._is_profiler_enabled:
        return profiler.record_function(PREFIX + name)
    return _NOTHING
