"""One ledger that many threads change."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType

from kvruntime.admission.demand import Demand
from kvruntime.admission.ledger import Ledger, Pace, Request
from kvruntime.errors import ScheduleError
from kvruntime.frames import is_on_stack

_MOST_PACES = 256  # demands whose durations are remembered


class SharedLedger:
    """A ledger, and a way for threads, tasks, finalizers and signal handlers to change it.

    An interrupt may end a change anywhere: the next one makes it again.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], float]) -> None:
        self.ledger, self._clock = ledger, clock
        self._lock = threading.RLock()
        self._changer: FrameType | None = None  # in which a change goes on
        self._changes: deque[Callable[[float], object]] = deque()
        self._looks_at = float("inf")
        self._paces: dict[Demand, Pace] = {}

    @property
    def held_pages(self) -> int:
        """Pages that generations may own now."""
        return self.ledger.held

    def request(self, demand: Demand, done: int = 0) -> Request:
        """A request of which so many legs are over, in nobody's list yet."""
        while demand not in self._paces and len(self._paces) >= _MOST_PACES:
            self._paces.pop(next(iter(self._paces)), None)
        return Request(demand, self._paces.setdefault(demand, Pace(demand)), done, done)

    def change(self, what: Callable[[float], object]) -> None:
        """Call ``what(now)``, which changes the ledger, and grant what can be granted. In the
        middle of a change of this thread, where only a finalizer or a signal handler can be, it is
        done at the end of that. It may be called twice: after an interrupt it is.
        """
        self._changes.append(what)
        if is_on_stack(self._changer):
            return
        with self._lock:
            self._changer = sys._getframe()
            while self._changes:
                try:
                    self._changes[0](self._clock())
                except Exception:
                    self._changes.popleft()
                    raise
                self._changes.popleft()
            self.ledger.leave_all_over()
            now = self._clock()
            self.ledger.settle(now)
            if self.ledger.queue:
                self._look_again(now, self.ledger.delay(now))
            self._changer = None

    def decide(self, what: Callable[[float], object]) -> None:
        """The same for one whose outcome is looked at next. Raises ScheduleError in the middle of a
        change of this thread.
        """
        if is_on_stack(self._changer):
            raise ScheduleError(
                "admission is in the middle of a change: a signal handler or finalizer may cancel "
                "and close, but not start generations"
            )
        self.change(what)

    def _look_again(self, now: float, delay: float) -> None:
        """In so many seconds the head of the queue may start."""
        is_due = self._looks_at <= now  # or was: its timer looks, or could not start
        if 0.0 < delay < float("inf") and (is_due or now + delay < self._looks_at):
            timer = threading.Timer(delay, self.look)
            timer.daemon = True
            with contextlib.suppress(RuntimeError):  # no more threads: whoever comes next looks
                timer.start()
                self._looks_at = now + delay

    def look(self) -> None:
        """Let those leave that are over, and grant what can be granted."""
        self.change(lambda now: None)

    def check(self) -> None:
        """Assert every invariant. For tests and idle points."""
        self.decide(lambda now: self.ledger.check())
