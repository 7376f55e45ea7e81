"""One generation's place among those that share a pool."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

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
        """Until it may start, or go on. Raises Cancelled; TimeoutError after ``timeout`` seconds,
        giving up nothing; ScheduleError where it would wait for a generation that this thread
        draws.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._bell.heard_by_thread() as heard:
            while not self._may_go_on():
                self._refuse_to_wait_for_myself()
                left = -1 if until is None else max(0.0, until - time.monotonic())
                if not heard.acquire(timeout=left):
                    ledger = self.shared.ledger
                    raise TimeoutError(
                        f"no turn in {timeout} s for one that needs {self.request.asks} pages: "
                        f"{ledger.held} of {ledger.num_pages} are held by {len(ledger.underway)} "
                        f"generations, and {len(ledger.queue)} wait to start"
                    )

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
            self.cancel()
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
        self._give_up_unused()
        self._bell.ring()

    def _give_up_unused(self) -> None:
        with contextlib.suppress(IndexError):  # somebody draws on it, who leaves at the end
            self._unused.pop()
            self.leave()

    def take(self) -> None:
        """For the generation that draws on it: waits until it may start. Raises ScheduleError if
        another one has it.
        """
        self.wait()
        try:
            self._unused.pop()
        except IndexError:
            self._may_go_on()  # raises Cancelled if that is why
            raise ScheduleError(_USED) from None
        self._enter_leg()

    def reach(self, step: int) -> None:
        """Before every step (scale * layers + layer): returns at once within a leg; at its end
        gives back what is free, and waits until the next one is granted.
        """
        if step < self._next_leg:
            return
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
        weakref.finalize(generation, self.leave).atexit = False

    def leave(self) -> None:
        """For the generation that drew on it: its pages have gone back. Twice is allowed."""
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

    def __exit__(self, *error: object) -> None:
        self._give_up_unused()


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
    """Wakes whoever waits, threads and tasks. Has no lock of its own: a signal handler may ring it
    in the middle of a wait.
    """

    def __init__(self) -> None:
        self._listeners: list[Callable[[], object]] = []

    def ring(self) -> None:
        for listener in list(self._listeners):
            with contextlib.suppress(RuntimeError):  # heard already, or the loop is closed
                listener()

    @contextlib.contextmanager
    def _heard(self, listener: Callable[[], object]) -> Iterator[None]:
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    @contextlib.contextmanager
    def heard_by_thread(self) -> Iterator[threading.Lock]:
        """A lock that can be acquired once for each time the bell rings, or several."""
        lock = threading.Lock()
        lock.acquire()
        with self._heard(lock.release):
            yield lock

    @contextlib.contextmanager
    def heard_by(self, loop: asyncio.AbstractEventLoop) -> Iterator[asyncio.Event]:
        """An event of that loop, set whenever the bell rings."""
        event = asyncio.Event()
        with self._heard(lambda: loop.call_soon_threadsafe(event.set)):
            yield event
