"""One generation's place among those that share a pool."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType

from kvruntime.admission.demand import Demand, never_waiting
from kvruntime.admission.ledger import Request
from kvruntime.admission.shared import SharedLedger
from kvruntime.errors import Cancelled, OutOfPages, ScheduleError

_USED = "this ticket is used: every generation needs its own"


class Ticket:
    """One generation's place, from ``Admission.submit`` until it is drawn or cancelled. A context
    manager, which gives an unused place up; so does dropping it.
    """

    def __init__(self, shared: SharedLedger, request: Request) -> None:
        self.shared, self.request = shared, request
        self._bell = _Bell()
        request.wake = self._bell.ring
        self._unused = [True]  # whoever pops it draws
        self._is_cancelled = False
        self._next_leg = 0  # the step that it begins with
        request.holder = weakref.ref(self)
        weakref.finalize(self, shared.look).atexit = False

    @property
    def has_started(self) -> bool:
        """Whether it may draw, or does, or did."""
        return self.request.has_started

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def wait(self, timeout: float | None = None) -> None:
        """Until it may start, or go on. Raises Cancelled; TimeoutError after so many seconds,
        giving up nothing; ScheduleError where it would wait for a generation that this thread
        draws.
        """
        while not self._may_go_on():
            self._refuse_to_wait_for_myself()
            if not self._bell.rung.wait(timeout):
                ledger = self.shared.ledger
                raise TimeoutError(
                    f"{self.request.asks} pages were not free in {timeout} s: {ledger.held} of "
                    f"{ledger.num_pages} are held by {len(ledger.underway)} generations"
                )
            self._bell.rung.clear()

    async def started(self) -> None:
        """The same for a task; one that is cancelled gives the place up. Another ticket that the
        task holds, and nobody draws on, may be what it waits for.
        """
        try:
            with self._bell.heard_by(asyncio.get_running_loop()) as heard:
                while not self._may_go_on():
                    await heard.wait()
                    heard.clear()
        except BaseException:
            self.close()
            raise

    def _may_go_on(self) -> bool:
        if self._is_cancelled:
            raise Cancelled("this generation's ticket was cancelled")
        if self.request.is_over:
            raise ScheduleError(_USED)
        return self.request.is_running

    def _refuse_to_wait_for_myself(self) -> None:
        me = threading.current_thread()
        for other in list(self.shared.ledger.underway):
            if other is self.request:
                break
            if other.owner is me:
                raise ScheduleError(
                    "this would wait for ever for another generation of the same thread: end that "
                    "one first, or draw them in threads of their own"
                )

    def cancel(self) -> None:
        """Give the place up; a generation that draws on it raises Cancelled when its next leg
        begins, and closes. From any thread; twice is allowed.
        """
        self._is_cancelled = True
        if self._unused:
            self.close()
        self._bell.ring()

    def take(self) -> None:
        """For the generation that draws on it: waits until it may start. Raises ScheduleError if
        another one has it.
        """
        self.wait()
        try:
            self._unused.pop()
        except IndexError:
            raise ScheduleError(_USED) from None
        self._enter_leg()

    def reach(self, step: int) -> None:
        """Before every step (scale * layers + layer): returns at once within a leg; at its end
        gives back what is free, and waits until the next one is granted.
        """
        if step < self._next_leg:
            return
        self._bell.rung.clear()
        request, leg, ledger = self.request, self.request.done, self.shared.ledger
        self.shared.change(lambda now: ledger.end_leg(request, leg, now))
        self.wait()
        self._enter_leg()

    def _enter_leg(self) -> None:
        self.request.owner = threading.current_thread()
        first, number = self.request.demand.first_step, self.request.granted
        self._next_leg = first[number] if number < len(first) else sys.maxsize

    def finish(self) -> None:
        """The generation has come through its last step: nothing is held any more."""
        request, ledger = self.request, self.shared.ledger
        self.shared.change(lambda now: ledger.finish(request, now))

    def leave_with(self, generation: object) -> None:
        """Leave when that is dropped without having been closed."""
        self.request.holder = weakref.ref(generation)
        weakref.finalize(generation, self.shared.look).atexit = False

    def close(self) -> None:
        """Leave, after the pages have gone back. Twice is allowed."""
        self.request.is_over = True
        self.shared.look()

    def fork(self) -> Ticket:
        """For a twin of the generation; it never waits, since one thread may draw both. Raises
        OutOfPages where those under way may need the pages.
        """
        done = self.request.done
        return start_now(self.shared, never_waiting(self.request.demand, done), done)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._unused:
            self.close()


def start_now(shared: SharedLedger, demand: Demand, done: int = 0) -> Ticket:
    """A ticket that is taken and under way, before the queue. Raises OutOfPages."""
    request, ledger = shared.request(demand, done), shared.ledger
    ticket = Ticket(shared, request)
    shared.decide(lambda now: ledger.start_now(request, now))
    if not ticket.has_started:
        raise OutOfPages(demand.pages[done], max(0, ledger.slack), ledger.num_pages)
    ticket.take()
    return ticket


class _Bell:
    """Wakes whoever waits, a thread or a task."""

    def __init__(self) -> None:
        self.rung = threading.Event()
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def ring(self) -> None:
        self.rung.set()
        for loop, event in list(self._listeners):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
                loop.call_soon_threadsafe(event.set)

    @contextlib.contextmanager
    def heard_by(self, loop: asyncio.AbstractEventLoop) -> Iterator[asyncio.Event]:
        """An event of that loop, set whenever the bell rings."""
        listener = (loop, asyncio.Event())
        self._listeners.append(listener)
        try:
            yield listener[1]
        finally:
            self._listeners.remove(listener)
