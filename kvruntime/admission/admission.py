"""Who may draw, of all that share a pool."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvruntime.admission.demand import Demand, demand_of, never_waiting
from kvruntime.admission.ledger import Ledger
from kvruntime.admission.shared import SharedLedger
from kvruntime.admission.ticket import Ticket, start_now
from kvruntime.errors import QueueFull, WillNeverFit
from kvruntime.planning.demand import Plan
from kvruntime.sizes import check_positive
from kvruntime.storage.pool import Pool


@dataclass(frozen=True, slots=True)
class AdmissionStats:
    """held_pages: that generations may own now, never more than num_pages. underway: generations
    that have started; running: those of them that do not wait. queued: that have not started.
    """

    num_pages: int
    held_pages: int
    underway: int
    running: int
    queued: int


class Admission:
    """Who may draw, of all that share a pool; the others wait, and none for ever.

    A generation that is admitted can always run to its end: its demand is known step by step, and
    it goes on only where everybody that started before it can still finish (Ledger has the
    equation). What could not even fit alone is refused at once. Every generation waits at most
    until those that came before it have run to their ends, one after another: so those that share
    an admission must not wait for each other by other means.

    most_pages: of one generation. most_underway: generations at a time, since each has a workspace
    beside its pages; a thread's second one and forks come on top. most_waiting: in the queue. None:
    as many as there are. clock: seconds.

    Takes the pool for good: from now on its generations need ``PagedKVCache(admission=)`` or
    ``attach(admission=)``. Threads, and asyncio tasks of any loop, may share one.
    Raises ScheduleError for a pool that is in use.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        most_pages: int | None = None,
        most_underway: int | None = None,
        most_waiting: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(pool, Pool):
            raise ValueError(f"pool must be a Pool, got {pool!r}")
        limits = {"most_pages": most_pages, "most_underway": most_underway}
        for name, limit in {**limits, "most_waiting": most_waiting}.items():
            if limit is not None:
                check_positive(name, limit)
        self.pool = pool
        self._most_pages = min(most_pages or pool.num_pages, pool.num_pages)
        self._most_waiting = most_waiting
        self._shared = SharedLedger(Ledger(pool.num_pages, most_underway), clock)
        pool.claim(self._shared)

    @property
    def stats(self) -> AdmissionStats:
        """Counted while others go on: each number is right by itself."""
        ledger = self._shared.ledger
        underway = list(ledger.underway)
        running = sum(request.is_running for request in underway)
        return AdmissionStats(
            ledger.num_pages,
            self._shared.held_pages,
            len(underway),
            running,
            len(ledger.queue),
        )

    def submit(self, plan: Plan) -> Ticket:
        """A place in the queue, for a generation with this plan. It starts as soon as it may: see
        Ticket.wait.

        Raises WillNeverFit where it would not even fit alone, and QueueFull.
        """
        ledger, most = self._shared.ledger, self._most_waiting
        request = self._shared.request(self._demand(plan))
        ticket = Ticket(self._shared, request)
        found: list[int] = []  # in the queue

        def queue(now: float) -> None:
            if request not in ledger.queue:
                found[:] = [len(ledger.queue)]
                if most is None or found[0] < most:
                    ledger.submit(request)

        self._shared.decide(queue)
        if most is not None and found[0] >= most:
            raise QueueFull(found[0], most)
        return ticket

    async def acquire(self, plan: Plan) -> Ticket:
        """``submit`` for this plan, and wait until it may start, without a thread. Cancelling the
        task gives the place up. Hand the ticket to ``PagedKVCache.open(rows, ticket=)`` or
        ``Attachment.use``.
        """
        ticket = self.submit(plan)
        await ticket.started()
        return ticket

    def open(self, plan: Plan) -> Ticket:
        """A ticket for a generation of this plan that this thread draws from now on; waits until it
        may start.

        A thread that draws one already would wait for itself: its second one holds its peak from
        the beginning and never waits. Raises WillNeverFit, QueueFull, and OutOfPages where those
        under way may need the pages of a second one.
        """
        me = threading.current_thread()
        if any(request.owner is me for request in list(self._shared.ledger.underway)):
            return start_now(self._shared, never_waiting(self._demand(plan)))
        ticket = self.submit(plan)
        ticket.take()
        return ticket

    def gave(self, ticket: Ticket, plan: Plan) -> bool:
        """Whether the ticket was given here, for such a plan."""
        return ticket.shared is self._shared and ticket.request.demand == demand_of(plan)

    def check(self) -> None:
        """Assert every invariant. For tests and idle points."""
        self._shared.check()

    def _demand(self, plan: Plan) -> Demand:
        demand = demand_of(plan)
        if demand.peak > self._most_pages:
            each = self.pool.page_bytes + self.pool.plane_bytes
            fits = self._most_pages * plan.rows // demand.peak
            advice = f"{fits} of {plan.rows} rows would fit" if fits else "lower the budget"
            raise WillNeverFit(demand.peak * each, self._most_pages * each, advice)
        return demand
