"""PagedKVCache: what stands in for a model's own KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from kvruntime.attention import PAGED_QUERIES, choose_backend
from kvruntime.errors import KVRuntimeError, ScheduleError, WillNeverFit
from kvruntime.executor import Executor, Observer
from kvruntime.formats import row_format
from kvruntime.plan import WORKSPACE_LIMIT, Plan, choose_policy, plan_generation, profile_note
from kvruntime.pool import TORCH_DTYPES, free_bytes
from kvruntime.scheduler import ScaleRecord, Scheduler
from policies import CacheGeometry, Policy, Profile, ScaleSchedule, load_profile


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of the last generation; zeros before the first. Bytes are of the whole generation.

    token_bytes <= page_bytes: what the policy keeps after a scale, and the pages that hold it at
    the peak.
    baseline_bytes: the model's own cache, all scales, without the copy that torch.cat makes.
    backend_reason: why it is this back end. page_steps, gather_steps: layers whose attention read
    the pages themselves, and a gathered copy, one for each chunk of rows.
    kv_dtype, kv_groups: of the pages from scale kv_start on; None if all are exact.
    """

    policy: str
    profile: str
    backend: str
    backend_reason: str
    page_steps: int
    gather_steps: int
    kv_dtype: str | None
    kv_groups: int | None
    kv_start: int | None
    rows: int
    planned_pages: int
    peak_pages: int
    live_pages: int
    token_bytes: int
    page_bytes: int
    workspace_bytes: int
    baseline_bytes: int
    timeline: tuple[ScaleRecord, ...]


class PagedKVCache:
    """KV cache of one generation at a time, kept within a budget, in pages of one preallocated
    pool.

    ``open(rows)`` plans and makes the pool; then call ``attend`` for every layer of every scale, in
    order; then ``close()``, which also ends a generation that failed half way. ``with
    cache.open(rows):`` closes by itself.

    policy, budget, profile: see docs/policies.md; a float budget is a fraction of the history, an
    int a token count.
    kv_dtype, kv_groups, kv_start: int2, int4 or int8 pages with 1, 2, 4 or 8 groups of scale and
    shift, from that scale on; by default from where exact ones would take more. None: exact pages.
    backend, paged_queries: auto, sdpa or xformers, and up to how many queries of a scale xformers
    reads pages (docs/embedding.md).
    memory: most bytes that pool and workspace may take; open() raises WillNeverFit beyond it.
    softmax_scale: factor on q.k, 1 / sqrt(head_dim) by default.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        schedule: ScaleSchedule,
        policy: str | Policy = "scalekv",
        budget: float = 0.10,
        *,
        profile: Profile | str | Path | None = None,
        page_size: int | None = None,
        kv_dtype: str | None = None,
        kv_groups: int = 1,
        kv_start: int | None = None,
        backend: str = "auto",
        paged_queries: int = PAGED_QUERIES,
        memory: int | None = None,
        workspace_limit: int = WORKSPACE_LIMIT,
        softmax_scale: float | None = None,
        device: torch.device | str = "cpu",
        observer: Observer | None = None,
    ) -> None:
        if geometry.key_dtype != geometry.value_dtype:
            raise ValueError(
                f"attention wants K and V in one dtype, got {geometry.key_dtype} and "
                f"{geometry.value_dtype}"
            )
        if memory is not None and (not isinstance(memory, int) or memory <= 0):
            raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
        if softmax_scale is not None and not math.isfinite(softmax_scale):
            raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
        if isinstance(policy, str) and isinstance(profile, str | Path):
            profile = load_profile(profile)
        self._policy = choose_policy(policy, profile, geometry.layers)
        self._profile_note = profile_note(policy, profile, schedule)
        # one row is planned now, so that a budget that cannot work is refused before anything is
        # drawn
        self._row_plan = plan_generation(
            geometry,
            schedule,
            self._policy,
            budget,
            1,
            page_size,
            workspace_limit,
            row_format(kv_dtype, kv_groups),
            kv_start,
        )
        self._budget = budget
        self._memory = memory
        self._softmax_scale = geometry.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None and torch.cuda.is_available():
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._backend, self._backend_reason = choose_backend(
            backend, self._device, self._row_plan, paged_queries
        )
        self._observer = observer
        self._plan: Plan | None = None
        self._executor: Executor | None = None
        self._run: Scheduler | None = None
        self._timeline: list[ScaleRecord] = []

    @property
    def is_open(self) -> bool:
        return self._run is not None

    def plan(self, rows: int) -> Plan:
        """What a generation of ``rows`` rows needs."""
        return self._row_plan.for_rows(rows)

    def open(self, rows: int) -> PagedKVCache:
        """Start a generation of ``rows`` rows (guidance rows included).

        Raises ScheduleError if one is open, ValueError for bad rows and WillNeverFit if ``memory``
        is too small, all before anything is allocated.
        """
        if self._run is not None:
            raise ScheduleError("a generation is open: close() it first")
        plan = self.plan(rows)
        if self._memory is not None:
            plan.require(self._memory)
        if self._plan is None or self._plan.rows != rows:
            self._plan = self._executor = None  # the old tensors go before the new ones come
            try:
                with torch.inference_mode(False):  # they outlive a caller's inference_mode
                    self._executor = Executor(
                        plan, self._backend, self._softmax_scale, self._device, self._observer
                    )
            except (RuntimeError, MemoryError) as error:  # torch raises the one, numpy the other
                free = free_bytes(self._device)
                advice = "that much is free on the device: draw fewer at once or lower the budget"
                raise WillNeverFit(plan.total_bytes, free, advice) from error
            self._plan = plan
        assert self._executor is not None
        self._executor.start()
        self._run = Scheduler(plan, self._executor.pool)
        self._timeline = self._run.timeline
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer at the current scale, then compression of that layer's cache.

        q, k, v: [rows, n, heads, head_dim], n the tokens of this scale, k as the model would cache
        it (rotated, normalised). Every query sees all cached tokens of its lane and all n fresh
        ones. Returns [rows, n, heads, head_dim]. Raises ScheduleError or ValueError for a call that
        does not fit, changing nothing; any other failure closes the generation. No gradients.
        """
        run, executor = self._run, self._executor
        if run is None or executor is None:
            raise ScheduleError("no generation is open: call open(rows) first")
        geometry = run.plan.geometry
        if q.ndim != 4:
            raise ValueError(f"q must be [rows, n, heads, head_dim], got {tuple(q.shape)}")
        shape = (q.shape[0], q.shape[1], geometry.heads, geometry.head_dim)
        run.expect(layer, q.shape[0], q.shape[1])
        dtype = TORCH_DTYPES[geometry.key_dtype]
        for name, part in (("q", q), ("k", k), ("v", v)):
            if part.shape != shape or part.dtype != dtype:
                raise ValueError(
                    f"{name} must be {dtype} {shape}, got {part.dtype} {tuple(part.shape)}"
                )
            if part.device != self._device:
                raise ValueError(f"{name} is on {part.device}, the pool on {self._device}")
        try:
            # a pool that autograd watches would hold every generation; autocast would round scores
            with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
                if len(run.chunks) == 1:
                    out = executor.step(run, 0, q, k, v)
                else:
                    out = torch.empty(shape, dtype=dtype, device=q.device)
                    for chunk, rows in enumerate(run.chunks):
                        out[rows] = executor.step(run, chunk, q[rows], k[rows], v[rows])
            run.advance()
        except BaseException:
            self.close()
            raise
        return out

    def close(self) -> None:
        """End the generation and give back every page; the pool stays for the next one. Twice is
        allowed.
        """
        run, self._run = self._run, None
        if run is None or self._executor is None:
            return
        try:
            run.close()
        except KVRuntimeError:  # an interrupt in the middle of a table's change: see below
            pass
        if self._executor.pool.allocator.num_live:  # pages that no table owns: a new pool has none
            self._plan = self._executor = None

    def __enter__(self) -> PagedKVCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def stats(self) -> Stats:
        plan, executor = self._plan, self._executor
        pages = executor.pool.allocator if executor else None
        return Stats(
            policy=self._policy.name,
            profile=self._profile_note,
            backend=self._backend.name,
            backend_reason=self._backend_reason,
            page_steps=executor.page_steps if executor else 0,
            gather_steps=executor.gather_steps if executor else 0,
            **self._row_plan.page_format,
            rows=plan.rows if plan else 0,
            planned_pages=plan.peak_pages if plan else 0,
            peak_pages=pages.high_water if pages else 0,
            live_pages=pages.num_live if pages else 0,
            token_bytes=plan.token_bytes if plan else 0,
            page_bytes=plan.page_bytes if plan else 0,
            workspace_bytes=plan.workspace_bytes if plan else 0,
            baseline_bytes=plan.baseline_bytes()["all_scales_bytes"] if plan else 0,
            timeline=tuple(self._timeline),
        )
