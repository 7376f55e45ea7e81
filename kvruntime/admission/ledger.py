"""Which of the generations that share a pool may go on: the banker's algorithm for known demand."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

from kvruntime.admission.demand import Demand

_REMEMBERED = 9  # generations whose median is how long a leg takes


class Pace:
    """How long the legs of one demand take: the median of what was measured last, in seconds; until
    then in proportion to the work.

    until: time from the start to the beginning of each leg, and to the end. mean: pages held on
    average over that time.
    """

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        self._measured: deque[Sequence[float]] = deque(maxlen=_REMEMBERED)
        self._set([float(work) for work in demand.work])

    @property
    def is_measured(self) -> bool:
        return bool(self._measured)

    def learn(self, seconds: Sequence[float]) -> None:
        """A generation came to its end; its legs took so long, waiting left out."""
        if sum(seconds) > 0:
            self._measured.append(seconds)
            self._set([median(each) for each in zip(*self._measured, strict=True)])

    def _set(self, seconds: Sequence[float]) -> None:
        total = sum(seconds)
        held = sum(one * pages for one, pages in zip(seconds, self._demand.pages, strict=True))
        self.until = [0.0, *accumulate(seconds)]
        self.mean = held / total if total else float(self._demand.peak)


@dataclass(eq=False)
class Request:
    """What one generation asks of the ledger.

    done: legs that are over. granted: legs that were granted, done or done + 1; told: those that
        ``wake`` was called for. began: when the last leg was granted. spent: seconds of each leg.
    owner: the thread that draws it. holder: gives None once nobody has it any more.
    is_over: it was closed.
    """

    demand: Demand
    pace: Pace
    done: int = 0
    granted: int = 0
    told: int = 0
    began: float = -math.inf
    spent: list[float] = field(init=False)
    wake: Callable[[], object] = lambda: None
    owner: object = None
    holder: Callable[[], object] = lambda: True
    is_over: bool = False

    def __post_init__(self) -> None:
        self.spent = [0.0] * len(self.demand)

    @property
    def has_started(self) -> bool:
        """Whether a leg was ever granted to it."""
        return self.began > -math.inf

    @property
    def is_running(self) -> bool:
        """Whether it is in a leg; else it waits for one."""
        return self.granted > self.done

    @property
    def held(self) -> int:
        """Pages that it may have now."""
        if self.granted > self.done:
            return self.demand.pages[self.done]
        return self.demand.after[self.done - 1] if self.done else 0

    @property
    def peak_left(self) -> int:
        return self.demand.peak_left[self.done]

    @property
    def asks(self) -> int:
        """Pages beyond those it holds that the leg needs that it waits for."""
        return self.demand.pages[self.done] - self.held

    def grant(self, now: float) -> None:
        self.began = now
        self.granted = self.done + 1

    def delay(self, now: float, num_pages: int) -> float:
        """Seconds until the pace lets another one start behind it, as far as known: until it has
        come through the share mean / num_pages of its time. 0 if it has, infinity if it waits.
        """
        pace = self.pace
        missing = pace.mean / num_pages * pace.until[-1] - pace.until[self.done]
        if self.is_running and pace.is_measured:
            return max(0.0, missing - (now - self.began))
        return math.inf if missing > 0 else 0.0


class Ledger:
    """Grants legs of requests on ``num_pages`` pages, so that each can always come to its end.

    underway: those that have started, in that order. queue: those that have not, in the order in
        which they came.

    Always, for each request that is under way:
        its peak_left + what those behind it hold <= num_pages
    So the first needs nobody to move, and once it has left, nor does the next: a request waits at
    most until all that came before it have run to their ends, one after another.

    No threads and no clock: callers say what time it is, in seconds, and take turns. Every change
    is one assignment to a request or a list, so that an interrupt leaves nothing half done.
    """

    def __init__(self, num_pages: int, most_underway: int | None = None) -> None:
        self.num_pages, self.most_underway = num_pages, most_underway
        self.underway: list[Request] = []
        self.queue: list[Request] = []

    @property
    def held(self) -> int:
        """Pages that are granted."""
        return sum(request.held for request in self.underway)

    def submit(self, request: Request) -> None:
        """To the end of the queue. Raises ValueError for what can never fit."""
        if request.demand.peak > self.num_pages:
            raise ValueError(f"{request.demand.peak} pages of {self.num_pages}")
        self.queue.append(request)

    def start_now(self, request: Request, now: float) -> bool:
        """Start before the queue, or not at all: for one that nobody can wait for. Whether it has
        started: twice is allowed.
        """
        if request in self.underway:
            return True
        if request.asks > self.slack:
            return False
        self.underway.append(request)
        request.grant(now)
        return True

    def end_leg(self, request: Request, leg: int, now: float) -> None:
        """That leg is over, and not the last one. Twice is allowed."""
        if request.done == leg:
            request.spent[leg] = now - request.began
            request.done += 1

    def finish(self, request: Request, now: float) -> None:
        """It has come through its last leg: how long each took is remembered, and it leaves."""
        request.spent[-1] = now - request.began
        request.pace.learn(request.spent)
        self.leave(request)

    def leave(self, request: Request) -> None:
        """It is over, or waits no longer. Twice is allowed."""
        if request in self.queue:
            self.queue.remove(request)
        if request in self.underway:
            self.underway.remove(request)

    def leave_all_over(self) -> None:
        """Let those leave that are over, or that nobody has any more."""
        for request in (*self.underway, *self.queue):
            if request.is_over or request.holder() is None:
                self.leave(request)

    def settle(self, now: float) -> None:
        """Grant what can be granted: legs of those under way, from the front on, then starts. Wake
        those that got something. O(requests under way).
        """
        slack = self.num_pages  # least of those in front
        for request, behind in self._with_what_is_behind():
            if not request.is_running and (asks := request.asks) <= slack:
                slack -= max(0, asks)
                request.grant(now)
            slack = min(slack, self.num_pages - request.peak_left - behind)
        while self.queue:
            request = self.queue[0]
            if not request.has_started and not (
                self.may_start(now) and self.start_now(request, now)
            ):
                break
            self.queue.pop(0)
        for request in self.underway:
            if request.granted > request.told:
                request.wake()
                request.told = request.granted

    def _with_what_is_behind(self) -> Iterator[tuple[Request, int]]:
        """Each that is under way, and what those behind it hold."""
        behind = self.held
        for request in self.underway:
            behind -= request.held
            yield request, behind

    @property
    def slack(self) -> int:
        """Pages that one behind all others may take: the least of num_pages - peak_left - what
        those behind hold.
        """
        least = self.num_pages
        for request, behind in self._with_what_is_behind():
            least = min(least, self.num_pages - request.peak_left - behind)
        return least

    def may_start(self, now: float) -> bool:
        """Whether the pace allows another start.

        Either all there are fit with their peaks: nobody will wait. Or each that has started has
        come through the share mean / num_pages of its time, mean: its pages on average. Then
        num_pages / mean are under way, at even distances: all that there is room for.
        """
        count = len(self.underway)
        if self.most_underway is not None and count >= self.most_underway:
            return False
        peaks = sum(one.peak_left for one in (*self.underway, *self.queue))
        return peaks <= self.num_pages or self.delay(now) <= 0

    def delay(self, now: float) -> float:
        """Seconds until the pace allows another start, as far as known; infinity where one that has
        hardly started waits.
        """
        return max((one.delay(now, self.num_pages) for one in self.underway), default=0.0)

    def check(self) -> None:
        """Assert every invariant. O(requests)."""
        assert self.held <= self.num_pages, "more granted than there is"
        for request, behind in self._with_what_is_behind():
            assert request.peak_left + behind <= self.num_pages, "cannot come to its end"
            assert request.granted - request.done in (0, 1), "a leg that nobody granted"
        assert not any(request.has_started for request in self.queue), "has started, and is queued"
        everybody = [*self.underway, *self.queue]
        assert len(set(map(id, everybody))) == len(everybody), "a request in two places"
