"""PagedKVCache: what stands in for a model's own KV cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kvruntime.admission import Admission, Ticket
from kvruntime.attention import choose_backend
from kvruntime.errors import WillNeverFit
from kvruntime.generation import Generation
from kvruntime.options import CacheOptions, check_softmax_scale
from kvruntime.planning import WORKSPACE_LIMIT, Plan, choose_policy, make_plan, require
from kvruntime.planning.workspace import Workspaces
from kvruntime.sizes import LARGEST, in_proportion, rows_by_scale
from kvruntime.step.run import Observer, Runner
from kvruntime.storage.memory import free_bytes, real_device
from kvruntime.storage.pool import Pool
from kvruntime.telemetry import opening
from policies import CacheGeometry, ScaleSchedule

_log = logging.getLogger("kvruntime")
_WORKSPACE_SHARE = 8  # of the device's free memory: one part


class PagedKVCache:
    """KV caches of a model's generations, kept within a budget, in pages of a pool.

    ``open(rows)`` starts a generation; several may be open at once, and each thread may have its
    own. pool: shared with other caches, of whatever geometry; None: each generation gets one of
    exactly its planned pages, which is kept for the next one of as many rows.
    admission: who may draw, of all that share its pool, which needs no ``pool`` beside it: ``open``
    waits for its turn then, and so does a generation where it needs more pages.

    softmax_scale: factor on q . k; head_dim ** -0.5 for plain attention, 1 for cosine attention,
    whose queries carry their own scale. There is no default: a wrong one draws wrong pictures
    without a word.
    observer: sees every step's queries, keys and values (step.run.Observer).
    own: what the model's own cache would hold, for ``baseline_bytes``, where its number formats are
    others (autocast leaves K in float32 beside V in bfloat16).

    Raises ValueError for options that cannot work, BackendUnavailable, and WillNeverFit for a
    budget in bytes that is too small.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        schedule: ScaleSchedule,
        options: CacheOptions | None = None,
        *,
        softmax_scale: float,
        pool: Pool | None = None,
        admission: Admission | None = None,
        device: torch.device | str = "cpu",
        observer: Observer | None = None,
        own: CacheGeometry | None = None,
    ) -> None:
        if options is not None and not isinstance(options, CacheOptions):
            raise ValueError(
                f"options must be CacheOptions, got {options!r}: for a policy by name write "
                "CacheOptions(policy=...)"
            )
        for name, value, kind in (
            ("geometry", geometry, CacheGeometry),
            ("schedule", schedule, ScaleSchedule),
            ("pool", pool, Pool | None),
            ("admission", admission, Admission | None),
        ):
            if not isinstance(value, kind):
                raise ValueError(f"{name} must be a {kind}, got {value!r}")
        if geometry.key_dtype != geometry.value_dtype:
            raise ValueError(
                f"attention wants K and V in one dtype, got {geometry.key_dtype} and "
                f"{geometry.value_dtype}"
            )
        if admission is not None:
            if pool not in (None, admission.pool):
                raise ValueError("pool is another one than the admission's: give one of both")
            pool = admission.pool
        self._admission = admission
        self.geometry, self.schedule = geometry, schedule
        self.options = options or CacheOptions()
        self._softmax_scale = check_softmax_scale(softmax_scale)
        self._coding = self.options.coding_for(geometry)
        self._policy, self._profile_note = choose_policy(self.options, geometry, schedule)
        self._pool, self._own = pool, own
        self._device = real_device(device) if pool is None else pool.device
        if pool is not None and torch.device(device).type not in ("cpu", pool.device.type):
            raise ValueError(f"device {device}, but the pool is on {pool.device}")
        free = free_bytes(self._device) if self._device.type != "meta" else WORKSPACE_LIMIT
        self._workspace_limit = max(1, min(WORKSPACE_LIMIT, free // _WORKSPACE_SHARE))
        # one row is planned now, so that a budget that cannot work is refused before anything is
        # drawn
        self._row_plan = self._make_plan(1)
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._backend, self._backend_reason = choose_backend(
            self.options.backend, self._device, self._row_plan, self.options.paged_queries
        )
        self._observer = observer
        self._workspaces = Workspaces(self._device)
        self._idle_pools: list[Pool] = []  # at most one; no lock, which an interrupt might keep

    @property
    def page_bytes(self) -> int:
        """Bytes of a page's K and V, for ``Pool(page_bytes=...)``."""
        return self._row_plan.bytes_per_page

    @property
    def plane_bytes(self) -> int:
        """Bytes of a page's planes, log weights among them, for ``Pool(plane_bytes=...)``."""
        return self._row_plan.plane_bytes_per_page

    @property
    def facts(self) -> dict[str, Any]:
        """What is the same for all generations, by the names of Stats."""
        return {
            "policy": self._policy.name,
            "profile": self._profile_note,
            "backend": self._backend.name,
            "backend_reason": self._backend_reason,
        }

    def plan(self, rows: int, rows_from: Mapping[int, int] | None = None) -> Plan:
        """What a generation of ``rows`` rows needs. rows_from: {scale: rows from there on}, for
        samplers that drop rows half way, or repeat them all as often.
        """
        if self.options.is_shared_by_rows:
            by_scale = rows_by_scale(len(self.schedule), rows, rows_from)
            if by_scale not in self._plans:  # bytes of a generation: more rows, fewer tokens
                self._plans[by_scale] = self._make_plan(rows, rows_from)
            return self._plans[by_scale]
        return self._row_plan.for_rows(rows, rows_from)

    def _plan_for(self, like: Plan) -> Callable[[int], Plan] | None:
        """As ``max_rows`` wants it: other rows at first, of which as many go or are repeated."""
        if not self.options.is_shared_by_rows:
            return None
        by_scale = like.rows_by_scale
        return lambda rows: self.plan(rows, dict(enumerate(in_proportion(by_scale, rows))))

    def _make_plan(self, rows: int, rows_from: Mapping[int, int] | None = None) -> Plan:
        return make_plan(
            self.geometry,
            self.schedule,
            self._policy,
            self.options,
            rows,
            rows_from=rows_from,
            page_bytes=self._pool.page_bytes if self._pool else None,
            plane_bytes=self._pool.plane_bytes if self._pool else None,
            workspace_limit=self._workspace_limit,
            own=self._own,
        )

    def open(
        self,
        rows: int,
        rows_from: Mapping[int, int] | None = None,
        ticket: Ticket | None = None,
    ) -> Generation:
        """Start a generation of ``rows`` rows (guidance rows included). rows_from: {scale: rows
        from there on}; ``keep_rows`` or ``branch`` goes before each of those scales. ticket: of
        ``Admission.acquire`` or ``submit``, for the plan of these rows; None: with an admission,
        wait for a new one here.

        Raises ValueError for bad rows or a ticket of another plan, WillNeverFit if ``memory`` or
        the pool is too small, and OutOfPages if what the pool has promised to others leaves too
        little now; all before anything is allocated. With an admission also QueueFull, Cancelled.
        """
        plan = self.plan(rows, rows_from)
        if self.options.memory is not None:
            assert isinstance(self.options.memory, int), "CacheOptions parses it"
            require(plan, self.options.memory, plan_for=self._plan_for(plan))
        pool, on_close = self._pool, None
        if pool is None:
            pool, on_close = self._own_pool(plan), self._take_back
        runner = Runner(
            plan, pool, self._backend, self._softmax_scale, self._observer, self._coding
        )
        ticket = self._admitted(plan, ticket)
        generation = Generation(runner, self._workspaces, self.facts, on_close, ticket)
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s", opening(plan, pool, self.facts))
        return generation

    def _admitted(self, plan: Plan, ticket: Ticket | None) -> Ticket | None:
        """The ticket that a generation of this plan draws on; waits until it may."""
        if self._admission is None:
            if ticket is not None:
                raise ValueError("a ticket goes with the admission that gave it: this has none")
            return None
        if ticket is None:
            return self._admission.open(plan)
        if not self._admission.gave(ticket, plan):
            raise ValueError(
                f"the ticket is of another admission, or of another plan than this one, which has "
                f"{plan.peak_pages} pages at its peak: submit(cache.plan(rows)) of this very cache"
            )
        ticket.take()
        return ticket

    def _own_pool(self, plan: Plan) -> Pool:
        """The pool of the last generation if it has the planned pages, else a new one."""
        if plan.peak_pages > LARGEST:
            advice = "no device has that much: draw fewer at once or lower the budget"
            raise WillNeverFit(plan.page_bytes, free_bytes(self._device), advice)
        try:
            pool: Pool | None = self._idle_pools.pop()
        except IndexError:
            pool = None
        num_pages = max(1, plan.peak_pages)
        each = (plan.bytes_per_page, plan.plane_bytes_per_page)
        if pool is not None and (pool.num_pages, pool.page_bytes, pool.plane_bytes) == (
            num_pages,
            *each,
        ):
            return pool
        del pool  # before the new one comes
        self._workspaces.clear()
        return Pool(
            num_pages=num_pages, page_bytes=each[0], plane_bytes=each[1], device=self._device
        )

    def _take_back(self, pool: Pool) -> None:
        if not pool.owners:  # else a fork still draws
            self._idle_pools[:] = [pool]

    def let_go(self) -> None:
        """Free what is kept between generations: the pool, unless it is shared, and the
        workspace.
        """
        self._idle_pools.clear()
        self._workspaces.clear()
