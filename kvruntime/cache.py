"""PagedKVCache: what stands in for a model's own KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from allocator import BlockTable
from kvruntime.attention import sdpa
from kvruntime.errors import KVRuntimeError, ScheduleError, WillNeverFit
from kvruntime.plan import WORKSPACE_LIMIT, Plan, choose_policy, plan_generation, profile_note
from kvruntime.pool import TORCH_DTYPES, Pool, free_bytes
from kvruntime.scheduler import ScaleRecord, Scheduler
from policies import CacheGeometry, Policy, Profile, ScaleSchedule, Step

Observer = Callable[[int, int, int, Tensor, Tensor], None]
"""Called after each step with scale, layer, first row, queries [rows, n, heads, head_dim] and keys
[rows, heads, cached + n, head_dim], once for each chunk of rows. Keys are a view of the workspace:
copy what you keep."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of the last generation; zeros before the first. Bytes are of the whole generation.

    token_bytes <= page_bytes: what the policy keeps after a scale, and the pages that hold it at
    the peak.
    baseline_bytes: the model's own cache, all scales, without the copy that torch.cat makes.
    """

    policy: str
    profile: str
    backend: str
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
        memory: int | None = None,
        workspace_limit: int = WORKSPACE_LIMIT,
        softmax_scale: float | None = None,
        device: torch.device | str = "cpu",
        observer: Observer | None = None,
    ) -> None:
        if geometry.key_dtype != geometry.value_dtype:
            raise ValueError(
                f"{sdpa.NAME} wants K and V in one dtype, got {geometry.key_dtype} and "
                f"{geometry.value_dtype}"
            )
        if memory is not None and (not isinstance(memory, int) or memory <= 0):
            raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
        if softmax_scale is not None and not math.isfinite(softmax_scale):
            raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
        self._policy = choose_policy(policy, profile, geometry.layers)
        self._profile_note = profile_note(policy, profile, schedule)
        # one row is planned now, so that a budget that cannot work is refused before anything is
        # drawn
        self._row_plan = plan_generation(
            geometry, schedule, self._policy, budget, 1, page_size, workspace_limit
        )
        self._budget = budget
        self._memory = memory
        self._softmax_scale = geometry.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self._device = torch.device(device)
        self._observer = observer
        self._plan: Plan | None = None
        self._pool: Pool | None = None
        self._workspace: tuple[Tensor, Tensor] | None = None
        self._run: Scheduler | None = None
        self._timeline: list[ScaleRecord] = []

    @property
    def is_open(self) -> bool:
        return self._run is not None

    def plan(self, rows: int) -> Plan:
        """What a generation of ``rows`` rows needs."""
        one = self._row_plan
        return plan_generation(
            one.geometry,
            one.schedule,
            self._policy,
            self._budget,
            rows,
            one.page_size,
            one.workspace_limit,
        )

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
            self._drop_tensors()  # the old ones go before the new ones come
            try:
                with torch.inference_mode(False):  # they outlive a caller's inference_mode
                    self._make_tensors(plan)
            except (
                RuntimeError,
                MemoryError,
            ) as error:  # torch says RuntimeError, numpy MemoryError
                self._drop_tensors()
                free = free_bytes(self._device)
                advice = "that much is free on the device: draw fewer at once or lower the budget"
                raise WillNeverFit(plan.total_bytes, free, advice) from error
            self._plan = plan
        assert self._pool is not None
        self._pool.allocator.reset_high_water()
        self._run = Scheduler(plan, self._pool.allocator)
        self._timeline = self._run.timeline
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer at the current scale, then compression of that layer's cache.

        q, k, v: [rows, n, heads, head_dim], n the tokens of this scale, k as the model would cache
        it (rotated, normalised). Every query sees all cached tokens of its lane and all n fresh
        ones. Returns [rows, n, heads, head_dim]. Raises ScheduleError or ValueError for a call that
        does not fit, changing nothing; any other failure closes the generation. No gradients.
        """
        run, plan = self._run, self._plan
        if run is None or plan is None:
            raise ScheduleError("no generation is open: call open(rows) first")
        geometry = plan.geometry
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
            if part.device.type != self._device.type:
                raise ValueError(f"{name} is on {part.device}, the pool on {self._device}")
        try:
            # a pool that autograd watches would hold every generation; autocast would round scores
            with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
                if len(run.chunks) == 1:
                    out = self._attend_chunk(run, run.tables[0][layer], 0, q, k, v)
                else:
                    out = torch.empty(shape, dtype=dtype, device=q.device)
                    for rows, tables in zip(run.chunks, run.tables, strict=True):
                        chunk = q[rows], k[rows], v[rows]
                        out[rows] = self._attend_chunk(run, tables[layer], rows.start, *chunk)
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
        if run is None or self._pool is None:
            return
        try:
            run.close()
        except KVRuntimeError:  # an interrupt in the middle of a table's change: see below
            pass
        if self._pool.allocator.num_live:  # pages that no table owns: a new pool has none
            self._drop_tensors()

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
        plan, pool = self._plan, self._pool
        return Stats(
            policy=self._policy.name,
            profile=self._profile_note,
            backend=sdpa.NAME,
            rows=plan.rows if plan else 0,
            planned_pages=plan.peak_pages if plan else 0,
            peak_pages=pool.allocator.high_water if pool else 0,
            live_pages=pool.allocator.num_live if pool else 0,
            token_bytes=plan.token_bytes if plan else 0,
            page_bytes=plan.page_bytes if plan else 0,
            workspace_bytes=plan.workspace_bytes if plan else 0,
            baseline_bytes=plan.baseline_bytes()["all_scales_bytes"] if plan else 0,
            timeline=tuple(self._timeline),
        )

    def _drop_tensors(self) -> None:
        self._plan = self._pool = self._workspace = None

    def _make_tensors(self, plan: Plan) -> None:
        """The pool, and the workspace for one chunk of rows."""
        pages = max(1, plan.peak_pages)
        self._pool = Pool(pages, plan.page_size, plan.geometry, self._device)
        size = plan.chunk_rows * plan.geometry.heads * plan.workspace_row_tokens
        shape = (size * plan.geometry.head_dim,)
        dtype = TORCH_DTYPES[plan.geometry.key_dtype]
        self._workspace = (
            torch.empty(shape, dtype=dtype, device=self._device),
            torch.empty(shape, dtype=dtype, device=self._device),
        )

    def _attend_chunk(
        self, run: Scheduler, table: BlockTable, first_row: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Gather, attend, compress: some rows of one layer."""
        pool = self._pool
        assert pool is not None
        cached = int(table.lengths.max())
        count = cached + q.shape[1]
        keys, values = self._places(q.shape[0], max(table.pages.shape[2] * table.page_size, count))
        if cached:
            pool.gather(table, keys, values)
        keys, values = keys[:, :, :count], values[:, :, :count]
        keys[:, :, cached:] = k.transpose(1, 2)
        values[:, :, cached:] = v.transpose(1, 2)
        bias = self._hide_short_heads(table, keys, values) if table.is_ragged else None
        out = sdpa.attend(q, keys, values, bias, self._softmax_scale)
        if self._observer is not None:
            self._observer(run.scale, run.layer, first_row, q, keys)
        self._compress(run, pool, table, q, keys, values, bias)
        return out

    def _hide_short_heads(self, table: BlockTable, keys: Tensor, values: Tensor) -> Tensor:
        """A bias [heads, 1, tokens] for heads that hold fewer tokens than the longest one.

        What the gather brought past their end is zeroed too: stale bits may be NaN, and 0 x NaN is
        NaN.
        """
        place = np.arange(keys.shape[2])
        hidden = (place >= table.lengths[:, None]) & (place < table.lengths.max())
        mask = torch.from_numpy(hidden).to(keys.device)
        for part in (keys, values):
            part.masked_fill_(mask.unsqueeze(-1), 0.0)
        bias = torch.zeros(mask.shape, dtype=keys.dtype, device=keys.device)
        return bias.masked_fill_(mask, -torch.inf).unsqueeze(1)

    def _compress(
        self,
        run: Scheduler,
        pool: Pool,
        table: BlockTable,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
    ) -> None:
        """Write this layer's survivors of the gathered candidates, and give back the pages beyond
        them.
        """
        plan, scored = run.plan, self._policy.num_queries > 0
        before, after = table.lengths, run.plan.lengths[run.scale, run.layer]
        cached, count = int(before.max()), keys.shape[2]
        if not after.any():
            table.release()
            return
        if scored and not table.is_ragged and (after == count).all():
            table.resize(after)
            pool.write(table, slice(cached, count), keys[:, :, cached:], values[:, :, cached:])
            return
        tokens = np.empty(0, dtype=np.int64) if scored else run.candidates
        scale = self._softmax_scale
        step = Step(plan.schedule, run.scale, run.layer, after, tokens, q, keys, bias, scale)
        if scored:
            kept = self._policy.select(step)
            assert isinstance(kept, Tensor)
            places = kept.unsqueeze(-1).expand(-1, -1, -1, keys.shape[3])
            table.resize(after)
            k, v = keys.gather(2, places), values.gather(2, places)
            if table.is_ragged:
                pool.write_ragged(table, k, v)
            else:
                pool.write(table, slice(0, int(after[0])), k, v)
            return
        if run.compaction is None:
            survivors = self._policy.select(step)
            assert isinstance(survivors, np.ndarray)
            run.compact(survivors)
        move = run.compaction
        assert move is not None
        table.resize(after)
        if move.sources.size == count - cached and move.sources[0] == cached:
            k, v = keys[:, :, cached:], values[:, :, cached:]  # the whole scale, and nothing else
        else:
            sources = torch.from_numpy(move.sources).to(keys.device)
            k, v = keys[:, :, sources], values[:, :, sources]
        pool.write(table, move.targets, k, v)

    def _places(self, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The workspace as keys and values [rows, heads, tokens, head_dim]."""
        assert self._workspace is not None
        geometry = self._row_plan.geometry
        shape = (rows, geometry.heads, tokens, geometry.head_dim)
        size = rows * geometry.heads * tokens * geometry.head_dim
        keys, values = self._workspace
        return keys[:size].view(shape), values[:size].view(shape)
