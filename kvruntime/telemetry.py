"""What a pool and its generations look like now, for people, logs and Prometheus.

Bytes of torch, of the driver (NVML) and of the host (psutil) are kept apart: torch counts what its
own allocator holds, NVML what all processes took, psutil what this process has in main memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from kvruntime.admission import Admission, AdmissionStats
from kvruntime.extras import extra
from kvruntime.generation import Generation
from kvruntime.planning import Plan
from kvruntime.sizes import in_units
from kvruntime.stats import Stats
from kvruntime.storage.memory import nvml_memory
from kvruntime.storage.pool import Pool, PoolStats


@dataclass(frozen=True, slots=True)
class HostMemory:
    """psutil's reading: of this process, and of the machine."""

    resident_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class TorchMemory:
    """Of torch's allocator on the pool's device: in use, and kept."""

    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, slots=True)
class DriverMemory:
    """NVML's reading of the pool's device, all processes together."""

    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A pool at one moment, all bytes. device: that it is on. generations: the open ones. host: of
    this process and machine. admission: None where there is none; torch, driver: None on a CPU, and
    where NVML does not answer.
    """

    device: str
    pool: PoolStats
    admission: AdmissionStats | None
    generations: tuple[Stats, ...]
    host: HostMemory
    torch: TorchMemory | None
    driver: DriverMemory | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def snapshot(source: Pool | Admission) -> Snapshot:
    """The pool that is the source, or that of the admission that is, now. Some 0.1 ms, on CUDA a
    few more; from any thread, also while others draw: each figure is right by itself. Raises
    ValueError for another source.
    """
    admission = source if isinstance(source, Admission) else None
    pool = source.pool if isinstance(source, Admission) else source
    if not isinstance(pool, Pool):
        raise ValueError(f"snapshot is of a Pool or an Admission, got {source!r}")
    is_cuda, on_torch, by_driver = pool.device.type == "cuda", None, None
    if is_cuda:
        on_torch = TorchMemory(
            torch.cuda.memory_allocated(pool.device), torch.cuda.memory_reserved(pool.device)
        )
        told = nvml_memory(pool.device)
        by_driver = None if told is None else DriverMemory(told.used, told.total)
    memory = psutil.Process(os.getpid()).memory_info()
    return Snapshot(
        str(pool.device),
        pool.stats,
        None if admission is None else admission.stats,
        tuple(owner.stats for owner in pool.owners if isinstance(owner, Generation)),
        HostMemory(memory.rss, psutil.virtual_memory().available),
        on_torch,
        by_driver,
    )


_GAUGES = {  # of Prometheus, by the path in a snapshot
    "pool.num_pages": ("pool_pages", "Pages of the pool."),
    "pool.live_pages": ("pool_live_pages", "Pages that generations own."),
    "pool.free_pages": ("pool_free_pages", "Pages that nobody owns."),
    "pool.reserved_pages": ("pool_reserved_pages", "Pages that generations may own at most."),
    "pool.peak_pages": ("pool_peak_pages", "Most pages live at once since the pool was empty."),
    "pool.pool_bytes": ("pool_bytes", "Bytes of the pool."),
    "admission.held_pages": ("admission_held_pages", "Pages that those under way may own now."),
    "admission.underway": ("admission_underway", "Generations that have started."),
    "admission.running": ("admission_running", "Generations that draw and do not wait."),
    "admission.queued": ("admission_queued", "Generations that wait to start."),
    "host.resident_bytes": ("host_resident_bytes", "Main memory of this process (psutil)."),
    "host.available_bytes": ("host_available_bytes", "Main memory that is free (psutil)."),
    "torch.allocated_bytes": ("torch_allocated_bytes", "In use of torch's allocator."),
    "torch.reserved_bytes": ("torch_reserved_bytes", "Kept by torch's allocator."),
    "driver.used_bytes": ("driver_used_bytes", "Used on the device by all processes (NVML)."),
    "driver.total_bytes": ("driver_total_bytes", "Memory of the device (NVML)."),
}


class Collector:
    """Gauges of a pool or an admission for ``prometheus_client``, read when they are asked for:
    ``registry.register(Collector(admission))``. Needs the extra "telemetry".
    """

    def __init__(self, source: Pool | Admission) -> None:
        self._source = source

    def collect(self) -> Iterable[Any]:
        """Metric families, named kvruntime_..."""
        with extra("telemetry"):
            from prometheus_client.core import GaugeMetricFamily
        now = snapshot(self._source)
        for path, (name, text) in _GAUGES.items():
            part, field = path.split(".")
            read = getattr(now, part)
            if read is not None:
                yield GaugeMetricFamily(f"kvruntime_{name}", text, value=getattr(read, field))
        yield GaugeMetricFamily(
            "kvruntime_generations", "Open generations.", value=len(now.generations)
        )


def opening(plan: Plan, pool: Pool, facts: dict[str, Any]) -> str:
    """The line that is logged when a generation is opened."""
    geometry, own = plan.geometry, plan.baseline_bytes()["with_cat_copy_bytes"]
    pages = "" if plan.records is None else f", {plan.records.name} from scale {plan.start_scale}"
    return (
        f"opened: {facts['policy']}, {plan.budget_tokens} of {plan.schedule.history} tokens"
        f"{pages}; {plan.rows} rows, {geometry.layers} layers of {geometry.heads} heads of "
        f"{geometry.head_dim} {geometry.key_dtype}, {len(plan.schedule)} scales; "
        f"{plan.peak_pages} pages of {plan.page_size} tokens, {in_units(plan.page_bytes)}, in a "
        f"pool of {pool.num_pages} on {pool.device}, and {in_units(plan.workspace_bytes)} to work "
        f"in, in place of {in_units(own)}; back end {facts['backend']}: {facts['backend_reason']}"
    )
