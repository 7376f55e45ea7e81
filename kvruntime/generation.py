"""One generation: its rows go through the scales in lockstep, its lanes lie in pages of a pool."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from allocator import BlockTable
from kvruntime.arguments import check_tensor, refuse_transposed, row_numbers
from kvruntime.errors import ScheduleError
from kvruntime.planning.demand import Plan
from kvruntime.planning.workspace import Workspaces
from kvruntime.stats import ScaleRecord, Stats
from kvruntime.step.run import Runner, plainly, run_step
from kvruntime.storage.pool import Pool
from policies import TORCH_DTYPES


class Generation:
    """A generation of ``PagedKVCache.open(rows)``. Call ``attend`` for every layer of every scale,
    in order; then ``close()``, which also ends one that failed half way. A context manager.

    For one thread at a time; several generations may be open on one pool, in any interleaving.

    Always:
        layers are served in order within a scale, scales in order
        the lengths of a served layer's lanes are plan.tokens[scale, layer], an unserved one's the
        scale before
        after a step that failed it is closed, and no other generation has noticed
    """

    def __init__(
        self,
        runner: Runner,
        workspaces: Workspaces,
        facts: dict[str, Any],
        on_close: Callable[[Pool], None] | None = None,
    ) -> None:
        plan = runner.plan
        self._runner: Runner | None = runner  # None once closed: it holds the pool
        self._plan, self._device = plan, runner.pool.device
        self._workspaces = workspaces
        self._facts = facts
        self._on_close = on_close
        self._rows = plan.rows
        self._scale = self._layer = 0
        self._is_open = True
        self._page_steps = self._gather_steps = 0
        self._timeline: list[ScaleRecord] = []
        self._step: object = None  # whatever stands for the step that runs
        self._guard = threading.RLock()  # whose owner looks whether one runs
        pool, heads = runner.pool, plan.geometry.heads
        self._tables = [
            BlockTable(pool.allocator, plan.rows, heads) for _ in range(plan.geometry.layers)
        ]
        self._live_pages = self._peak_pages = 0  # between steps
        pool.admit(self, self._tables, plan.peak_pages)

    @property
    def is_open(self) -> bool:
        return self._is_open

    @property
    def rows(self) -> int:
        """Rows that the next step is for."""
        return self._rows

    @property
    def scale(self) -> int:
        """The scale that the next step belongs to."""
        return self._scale

    @property
    def plan(self) -> Plan:
        return self._plan

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer at the current scale, then compression of that layer's cache.

        q, k, v: [rows, n, heads, head_dim], n the tokens of this scale, k as the model would cache
        it (rotated, normalised). Every query sees all cached tokens of its lane and all n fresh
        ones. Returns [rows, n, heads, head_dim]. Raises ScheduleError or ValueError for a call that
        does not fit, changing nothing; any other failure closes the generation. No gradients.
        """
        step = object()
        try:
            with self._guard:
                self._check_call(layer, q, k, v)
                self._step = step
            with plainly(q.device.type):
                out = self._attend(layer, q, k, v)
            self._advance()
            self._step = None
            return out
        except BaseException:
            if self._step is step:  # else the call did not fit
                self._step = None
                self._end()
            raise

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan, table, runner = self._plan, self._tables[layer], self._runner
        assert runner is not None
        workspace, owned = self._workspaces.borrow(plan.scratch_bytes), table.num_owned
        out, step = None, plan.chunk_rows
        for start in range(0, self._rows, step):
            rows = slice(start, min(start + step, self._rows))
            part, from_pages = run_step(
                runner, workspace, table, self._scale, layer, rows, q[rows], k[rows], v[rows]
            )
            self._page_steps += from_pages
            self._gather_steps += not from_pages
            if rows == slice(0, self._rows):
                out = part
                break
            if out is None:
                out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            out[rows] = part
            del part
        self._workspaces.give_back(workspace)
        self._live_pages += table.num_owned - owned
        self._peak_pages = max(self._peak_pages, self._live_pages)
        assert out is not None
        return out

    def _check_call(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise unless this call is the next one of the schedule."""
        geometry, schedule = self._plan.geometry, self._plan.schedule
        if not self._is_open:
            raise ScheduleError("this generation is closed: open(rows) starts another")
        if self._step is not None:
            raise ScheduleError(
                "a step of this generation is running already: give each thread a generation of "
                "its own"
            )
        if q.ndim != 4:
            raise ValueError(f"q must be [rows, n, heads, head_dim], got {tuple(q.shape)}")
        if self._scale == len(schedule):
            raise ScheduleError(f"all {self._scale} scales are done: close() and open() again")
        tokens, heads, dim = schedule.tokens[self._scale], geometry.heads, geometry.head_dim
        shape = (self._rows, tokens, heads, dim)
        for name, part in (("q", q), ("k", k), ("v", v)):
            refuse_transposed(name, part, shape)
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise ValueError(f"layer must be an int, got {layer!r}")
        wanted = (self._layer, self._rows, tokens)
        if (layer, q.shape[0], q.shape[1]) != wanted:
            raise ScheduleError(
                f"scale {self._scale} expects layer {wanted[0]} with {wanted[1]} rows "
                f"of {wanted[2]} tokens, "
                f"got layer {layer} with {q.shape[0]} rows of {q.shape[1]}"
            )
        dtype = TORCH_DTYPES[geometry.key_dtype]
        for name, part in (("q", q), ("k", k), ("v", v)):
            check_tensor(name, part, shape, dtype, self._device)

    def _advance(self) -> None:
        """This layer is served; after the last one the scale is."""
        plan = self._plan
        self._layer += 1
        if self._layer == plan.geometry.layers:
            kept = int(plan.tokens[self._scale].sum())
            self._timeline.append(ScaleRecord(self._scale, self._live_pages, kept))
            self._scale, self._layer = self._scale + 1, 0

    def fork(self) -> Generation:
        """A second generation that goes on from here by itself; pages are shared until one of the
        two writes them.

        Only between scales. It needs as many pages as this one at most: raises OutOfPages where
        the pool has not that many to promise. Give it a pool with room: ``PagedKVCache(pool=...)``.
        """
        self._check_boundary("fork")
        assert self._runner is not None
        runner = replace(self._runner, plan=self._plan.for_rows(self._rows))
        twin = Generation(runner, self._workspaces, self._facts, self._on_close)
        try:
            self._share_with(twin, runner.pool)
            twin._live_pages = twin._peak_pages = self._live_pages
            twin._scale = self._scale
            twin._timeline = list(self._timeline)
        except BaseException:
            twin._end()
            raise
        return twin

    def _share_with(self, twin: Generation, pool: Pool) -> None:
        with pool.changing():  # which knows the twin's tables, should this end half way
            for index, table in enumerate(self._tables):
                twin._tables[index] = table.share()

    def keep_rows(self, rows: int | Sequence[int] | NDArray[Any] | Tensor) -> None:
        """Go on with these rows alone, renumbered in the order given; the others' pages go back. An
        int keeps the first ones. Only between scales, for samplers that drop the guidance rows.

        Raises ValueError for anything but distinct row numbers, masks among it.
        """
        self._check_boundary("keep_rows")
        kept = row_numbers(rows, self._rows)
        assert self._runner is not None
        runner, pool = self._runner, self._runner.pool
        plan = self._plan.for_rows(kept.size)
        try:
            self._thin(kept, pool, plan)
            self._live_pages = sum(table.num_owned for table in self._tables)
            self._runner, self._plan = replace(runner, plan=plan), plan
            self._rows = kept.size
        except BaseException:
            self._end()
            raise

    def _thin(self, kept: NDArray[np.int64], pool: Pool, plan: Plan) -> None:
        with pool.changing():
            for table in self._tables:
                table.keep_rows(kept)
            pool.reserve(self, plan.peak_pages)

    def _check_boundary(self, what: str) -> None:
        if not self._is_open:
            raise ScheduleError(f"{what}: this generation is closed")
        if self._step is not None:
            raise ScheduleError(f"{what} goes between scales: a step is running")
        if self._layer:
            raise ScheduleError(
                f"{what} goes between scales: scale {self._scale} has served {self._layer} of "
                f"{self._plan.geometry.layers} layers"
            )

    def close(self) -> None:
        """End the generation and give back every page. Twice is allowed; never from an observer."""
        if self._step is not None:
            raise ScheduleError("close() while a step runs: raise an exception instead")
        self._end()

    def _end(self) -> None:
        """Close; an interrupt in the middle of it is carried out first and raised after."""
        try:
            self._let_go()
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        if self._runner is None:
            return
        pool = self._runner.pool
        pool.dismiss(self)
        on_close, self._on_close = self._on_close, None
        self._is_open = False
        if on_close is not None:
            on_close(pool)
        self._runner = None

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def stats(self) -> Stats:
        plan = self._plan
        baseline = plan.baseline_bytes()
        return Stats(
            **self._facts,
            **plan.page_format,
            page_steps=self._page_steps,
            gather_steps=self._gather_steps,
            page_size=plan.page_size,
            rows=plan.rows,
            budget_tokens=plan.budget_tokens,
            planned_pages=plan.peak_pages,
            peak_pages=self._peak_pages,
            live_pages=sum(table.num_owned for table in self._tables),
            token_bytes=plan.token_bytes,
            page_bytes=plan.page_bytes,
            weight_bytes=plan.weight_bytes,
            workspace_bytes=plan.workspace_bytes,
            baseline_bytes=baseline["all_scales_bytes"],
            history_bytes=baseline["history_bytes"],
            timeline=tuple(self._timeline),
        )
