"""A memory-managed, paged KV cache for next-scale (VAR) image models.

import kvruntime
with kvruntime.attach(model, policy="scalekv", budget=0.10) as cache:
    pictures = model.autoregressive_infer_cfg(B=8, label_B=207)
print(cache.stats)
"""

from pathlib import Path as _Path

import allocator as _allocator
import policies as _policies

for _package in (_allocator, _policies):
    _found = _Path(_package.__file__ or "").resolve().parent
    if _found.parent != _Path(__file__).resolve().parent.parent:
        raise ImportError(
            f"kvruntime needs its own package {_package.__name__!r} but Python found {_found}: "
            "rename yours or change the order of sys.path"
        )

from kvruntime.adapters import Embedding, Parity, attach, check
from kvruntime.admission import Admission, AdmissionStats, Ticket
from kvruntime.cache import PagedKVCache
from kvruntime.errors import (
    BackendUnavailable,
    Cancelled,
    EmbeddingError,
    KVRuntimeError,
    OutOfPages,
    PageStateError,
    QueueFull,
    ScheduleError,
    UnsupportedModel,
    WillNeverFit,
)
from kvruntime.generation import Generation
from kvruntime.options import CacheOptions
from kvruntime.origin import Provenance, provenance
from kvruntime.planning import plan
from kvruntime.stats import Stats
from kvruntime.storage.pool import Pool, PoolStats
from kvruntime.telemetry import Snapshot, snapshot
from policies import Allocation, CacheGeometry, Policy, ScaleSchedule, Selection

__version__ = "0.2.0"

__all__ = [
    "Admission",
    "AdmissionStats",
    "Allocation",
    "BackendUnavailable",
    "CacheGeometry",
    "CacheOptions",
    "Cancelled",
    "Embedding",
    "EmbeddingError",
    "Generation",
    "KVRuntimeError",
    "OutOfPages",
    "PageStateError",
    "PagedKVCache",
    "Parity",
    "Policy",
    "Pool",
    "PoolStats",
    "Provenance",
    "QueueFull",
    "ScaleSchedule",
    "ScheduleError",
    "Selection",
    "Snapshot",
    "Stats",
    "Ticket",
    "UnsupportedModel",
    "WillNeverFit",
    "attach",
    "check",
    "plan",
    "provenance",
    "snapshot",
]
