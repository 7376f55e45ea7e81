"""One generation: its rows go through the scales in lockstep, its lanes lie in pages of a pool."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from allocator import BlockTable
from kvruntime.admission import Ticket
from kvruntime.calls import (
    Place,
    check_append,
    check_branch,
    check_call,
    check_promised,
    check_rows,
)
from kvruntime.errors import ScheduleError
from kvruntime.planning.demand import Plan
from kvruntime.planning.workspace import Workspaces
from kvruntime.stats import Stats, Tally, stats_of
from kvruntime.step.run import Runner, plainly, run_steps
from kvruntime.storage.pool import Pool


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
        ticket: Ticket | None = None,
        scale: int = 0,
    ) -> None:
        plan = runner.plan
        self._runner: Runner | None = runner  # None once closed: it holds the pool
        self._plan, self._device = plan, runner.pool.device
        self._workspaces = workspaces
        self._facts = facts
        self._on_close = on_close
        self._rows = plan.rows
        self._scale, self._layer = scale, 0
        self._branched_at = 0  # where rows were repeated last
        self._is_open = True
        self._tally = Tally()
        self._step: object = None  # whatever stands for the step that runs
        self._guard = threading.RLock()  # whose owner looks whether one runs
        pool, heads = runner.pool, plan.geometry.heads
        self._tables = [
            BlockTable(pool.allocator, plan.rows, heads) for _ in range(plan.geometry.layers)
        ]
        self._ticket = ticket
        if ticket is not None:
            ticket.leave_with(self)  # before the pool's own finalizer: the later one runs first
        claimant = None if ticket is None else ticket.shared
        pool.admit(self, self._tables, 0 if claimant else plan.peak_pages_from(scale), claimant)

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
        out = self._step_through(
            lambda: check_call(self._plan, self.place, self._device, layer, q, k, v),
            lambda: self._serve(layer, q, k, v),
        )
        assert out is not None
        return out

    def append(self, scale: int, k: Sequence[Tensor], v: Sequence[Tensor]) -> None:
        """Put a scale into the cache that nobody attends from: one that was drawn before, say.
        k, v: for each layer [rows, n, heads, head_dim], as ``attend`` takes them. Raises
        ScheduleError where it is another scale's turn or the policy drops tokens by the queries of
        this one, ValueError for tensors that do not fit; any other failure closes the generation.
        """

        k, v = list(k), list(v)
        self._check_boundary("append")

        def serve() -> None:
            for layer, (keys, values) in enumerate(zip(k, v, strict=True)):
                self._serve(layer, None, keys, values)

        self._step_through(
            lambda: check_append(self._plan, self.place, self._device, scale, k, v), serve
        )

    def _step_through(
        self, check: Callable[[], None], work: Callable[[], Tensor | None]
    ) -> Tensor | None:
        """``work`` after ``check`` has let it in; it ends the generation if it fails."""
        step = object()
        try:
            with self._guard:
                self._check_idle()
                check()
                self._step = step
            with plainly(self._device.type):
                out = work()
            self._step = None
            return out
        except BaseException:
            if self._step is step:  # else the call did not fit
                self._step = None
                self._end()
            raise

    @property
    def place(self) -> Place:
        """What the next step is for."""
        copies = 1 if self._branched_at == self._scale else self._plan.copies(self._scale)
        return Place(self._scale, self._layer, self._rows, copies)

    def _serve(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> Tensor | None:
        plan, table, runner = self._plan, self._tables[layer], self._runner
        assert runner is not None
        if self._ticket is not None:
            self._ticket.reach(self._scale * plan.geometry.layers + layer)
        workspace = self._workspaces.borrow(plan.scratch_bytes)
        owned = table.most_owned = table.num_owned
        out, chunks, from_pages = run_steps(runner, workspace, table, self._scale, layer, q, k, v)
        self._workspaces.give_back(workspace)
        self._tally.step(q is not None, chunks, from_pages)
        self._tally.pages(owned, table.most_owned, table.num_owned)
        self._advance()
        return out

    def _advance(self) -> None:
        """This layer is served; after the last one the scale is."""
        plan = self._plan
        self._layer += 1
        if self._layer == plan.geometry.layers:
            self._tally.scale(self._scale, int(plan.tokens[self._scale].sum()))
            self._scale, self._layer = self._scale + 1, 0
            if self._ticket is not None and self._scale == len(plan.schedule):
                self._ticket.finish()

    def fork(self) -> Generation:
        """A second generation that goes on from here by itself; pages are shared until one of the
        two writes them. Only between scales. It reserves as many pages as this one from here on:
        raises OutOfPages where the pool, ``PagedKVCache(pool=...)``, has not that many to promise.
        """
        self._check_boundary("fork")
        assert self._runner is not None
        ticket = None if self._ticket is None else self._ticket.fork()
        shared = (self._runner, self._workspaces, self._facts, self._on_close)
        twin = Generation(*shared, ticket, self._scale)
        try:
            with self._runner.pool.changing():  # it knows the twin's tables, however this ends
                for index, table in enumerate(self._tables):
                    twin._tables[index] = table.share()
            twin._tally = self._tally.forked()
            twin._rows, twin._branched_at = self._rows, self._branched_at
        except BaseException:
            twin._end()
            raise
        return twin

    def branch(self, count: int) -> None:
        """Go on with ``count`` rows for each, next to each other as ``repeat_interleave`` has them,
        which share pages until one writes. Only where it is planned: ``open(rows, {scale: count *
        rows})``. Raises ScheduleError, and ValueError for another count."""
        self._check_boundary("branch")
        check_branch(self.place, count)
        assert self._runner is not None
        try:
            with self._runner.pool.changing():
                for table in self._tables:
                    table.repeat_rows(count)
            self._rows, self._branched_at = count * self._rows, self._scale
        except BaseException:
            self._end()
            raise

    def keep_rows(self, rows: int | Sequence[int] | NDArray[Any] | Tensor) -> None:
        """Go on with these rows alone, renumbered in the order given; the others' pages go back. An
        int keeps the first ones. Only between scales, for samplers that drop the guidance rows.

        Raises ValueError for anything but distinct row numbers, masks among it, and for more rows
        than are planned from here on; ScheduleError at the scale where rows are repeated.
        """
        self._check_boundary("keep_rows")
        kept = check_rows(self._plan, self.place, rows)
        assert self._runner is not None
        runner, pool = self._runner, self._runner.pool
        plan = self._plan.thinned(kept.size, self._scale)
        if self._branched_at:  # who shares with whom depends on which rows these are
            room = max(plan.rows_by_scale) * int(2 * plan.layer_pages.max())
            rehearsals = [table.rehearsal(kept, room) for table in self._tables]
            plan = plan.seen_from(self._scale, rehearsals)
            check_promised(self._plan, plan, self._scale, self._ticket is None)
        try:
            with pool.changing():
                for table in self._tables:
                    table.keep_rows(kept)
                if self._ticket is None:  # which goes by the plan of the beginning
                    pool.reserve(self, plan.peak_pages_from(self._scale))
            self._tally.live_pages = sum(table.num_owned for table in self._tables)
            self._runner, self._plan = replace(runner, plan=plan), plan
            self._rows = kept.size
        except BaseException:
            self._end()
            raise

    def _check_idle(self) -> None:
        if not self._is_open:
            raise ScheduleError("this generation is closed: open(rows) starts another")
        if self._step is not None:
            raise ScheduleError(
                "a step of this generation is running already: give each thread a generation of "
                "its own"
            )

    def _check_boundary(self, what: str) -> None:
        self._check_idle()
        if self._layer:
            raise ScheduleError(
                f"{what} goes between scales: scale {self._scale} has served {self._layer} of "
                f"{self._plan.geometry.layers} layers"
            )

    def close(self) -> None:
        """End the generation and give back every page; twice is allowed. Raises ScheduleError in a
        step, where an observer is."""
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
        if self._ticket is not None:
            self._ticket.leave()
        on_close, self._on_close = self._on_close, None
        self._is_open = False
        if on_close is not None:
            on_close(pool)
        self._runner = None

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    @property
    def stats(self) -> Stats:
        live_pages = sum(table.num_owned for table in self._tables)
        return stats_of(self._plan, self._facts, self._rows, live_pages, self._tally)
