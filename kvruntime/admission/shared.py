"""One ledger that many threads change."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from kvruntime.admission.demand import Demand
from kvruntime.admission.ledger import Ledger, Pace, Request
from kvruntime.errors import ScheduleError

_MOST_PACES = 256  # demands whose durations are remembered


class SharedLedger:
    """A ledger, and a way for threads, tasks, finalizers and signal handlers to change it.

    Whoever comes while another thread changes it leaves the change with that one and goes on: no
    thread waits for a lock, and a finalizer that comes in the middle of its own thread's change is
    no special case.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], float]) -> None:
        self.ledger, self._clock = ledger, clock
        self._lock = threading.Lock()
        self._changer: threading.Thread | None = None
        self._changes: deque[Callable[[float], object]] = deque()
        self._looks_at = float("inf")
        self._paces: dict[Demand, Pace] = {}

    @property
    def held_pages(self) -> int:
        """Pages that generations may own now."""
        return sum(request.held for request in list(self.ledger.underway))

    def request(self, demand: Demand, done: int = 0) -> Request:
        """A request of which so many legs are over, in nobody's list yet."""
        while demand not in self._paces and len(self._paces) >= _MOST_PACES:
            self._paces.pop(next(iter(self._paces)), None)
        return Request(demand, self._paces.setdefault(demand, Pace(demand)), done, done)

    def change(self, what: Callable[[float], object]) -> None:
        """Call ``what(now)``, which changes the ledger, now or as soon as others are done, and
        grant what can be granted. ``what`` may be called twice: after an interrupt it is.
        """
        self._changes.append(what)
        while self._changes and self._lock.acquire(blocking=False):
            try:
                self._changer = threading.current_thread()
                while self._changes:
                    self._changes[0](self._clock())
                    self._changes.popleft()
                now = self._clock()
                self.ledger.settle(now)
                if self.ledger.queue:
                    self._look_again(now, self.ledger.delay(now))
            finally:
                self._changer = None
                self._lock.release()

    def decide(self, what: Callable[[float], object]) -> None:
        """The same, and wait until it is done. Raises ScheduleError in the middle of a change of
        this very thread, where only a signal handler or a finalizer can be.
        """
        if self._changer is threading.current_thread():
            raise ScheduleError(
                "admission is in the middle of a change: a signal handler or finalizer may cancel "
                "and close, but not start generations"
            )
        done = threading.Event()

        def change(now: float) -> None:
            if not done.is_set():
                what(now)
                done.set()

        self.change(change)
        done.wait()

    def _look_again(self, now: float, delay: float) -> None:
        """In so many seconds the head of the queue may start."""
        if 0.0 < delay < float("inf") and now + delay < self._looks_at:
            self._looks_at = now + delay
            timer = threading.Timer(delay, self._look)
            timer.daemon = True
            timer.start()

    def _look(self) -> None:
        self._looks_at = float("inf")
        self.change(lambda now: None)

    def check(self) -> None:
        """Assert every invariant. For tests and idle points."""
        self.decide(lambda now: self.ledger.check())
