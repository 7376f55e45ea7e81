"""One card in simulated time: requests wait for pages by the real ledger, and draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvruntime.admission.demand import Demand, demand_of
from kvruntime.admission.ledger import Ledger, Pace, Request
from kvruntime.planning import Plan, plan

# Infinity-2B on an H200, eight pictures of 1M at once (docs/embedding.md): device time of a layer
# for one picture with guidance, and what a step takes at least, when the host launches it
DEVICE_SECONDS, STEP_SECONDS = 11.4e-3, 1.5e-3
JITTER = 0.2  # deviation of the logarithm of how long a leg takes


@dataclass
class Kind:
    """Requests of one plan. seconds: of each leg, alone on its card. busy: the share of these in
    which the device computes.
    """

    demand: Demand
    seconds: NDArray[np.float64]
    busy: NDArray[np.float64]
    pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self.pace = Pace(self.demand)

    @property
    def device_seconds(self) -> float:
        return float((self.seconds * self.busy).sum())

    @property
    def mean(self) -> float:
        """Pages held on average over its time."""
        return float((self.seconds * self.demand.pages).sum() / self.seconds.sum())

    def at_once(self) -> Kind:
        """The same in one leg, which holds its peak from beginning to end."""
        demand = Demand((0,), (self.demand.peak,), (0,), (sum(self.demand.work),))
        total = self.seconds.sum(keepdims=True)
        return Kind(demand, total, np.array([self.device_seconds]) / total)


def kind_of(planned: Plan, step_seconds: float) -> Kind:
    """Times by the multiplications of each step, linear layers and attention, in proportion to the
    measured ones; a step takes ``step_seconds`` at least.
    """
    demand, layers = demand_of(planned), planned.geometry.layers
    device = np.repeat(_step_seconds(planned), layers)
    wall = np.maximum(step_seconds, device)
    first = np.array(demand.first_step)
    seconds = np.add.reduceat(wall, first)
    return Kind(demand, seconds, np.add.reduceat(device, first) / seconds)


def _step_seconds(planned: Plan) -> NDArray[np.float64]:
    """Device time of one layer's step at each scale."""

    def multiplications(of: Plan) -> NDArray[np.float64]:
        width = of.geometry.heads * of.geometry.head_dim
        tokens = np.array(of.schedule.tokens, dtype=np.float64)
        kept = np.concatenate([[0], of.tokens.mean(axis=(1, 2))[:-1]])
        rows = np.array(of.rows_by_scale)
        return rows * tokens * (16 * width**2 + 2 * width * (kept + tokens))

    measured = multiplications(plan("infinity-2b", 2, "full", 1.0)).sum()
    seconds: NDArray[np.float64] = multiplications(planned) / measured * DEVICE_SECONDS
    return seconds


class Reservations(Ledger):
    """What a pool does without an admission: whoever fits with its peak starts."""

    def may_start(self, now: float) -> bool:
        return True

    def delay(self, now: float) -> float:
        return 0.0


class Card:
    """One card on which generations wait for pages, and draw. is_staggered: by admission; else each
    reserves its peak. is_shared: they slow each other down
    where together they would keep the device busy for more than all of the time; else each has its
    own pace.

    ends: when each came to its end. times: seconds from its arrival to then. refused: by a full
    queue; never: too large for the pool. trace: seconds, pages granted, generations that draw,
    after each event.
    """

    def __init__(
        self,
        num_pages: int,
        seed: int,
        is_staggered: bool,
        *,
        is_shared: bool = False,
        most_waiting: int | None = None,
    ) -> None:
        self.ledger = Ledger(num_pages) if is_staggered else Reservations(num_pages)
        self.now, self._is_staggered = 0.0, is_staggered
        self._is_shared, self._most_waiting = is_shared, most_waiting
        self._chance = np.random.default_rng(seed)
        self._running: dict[int, _Running] = {}
        self.ends: list[float] = []
        self.times: list[float] = []
        self.trace: list[tuple[float, int, int]] = []
        self.refused = self.never = 0

    def run(self, arrivals: Sequence[tuple[float, Kind]]) -> None:
        """Until all that came, in this order, have left."""
        coming = 0
        while coming < len(arrivals) or self.ledger.underway:
            due = arrivals[coming][0] - self.now if coming < len(arrivals) else math.inf
            self._pass(max(0.0, min(due, self._until_next())))
            while coming < len(arrivals) and arrivals[coming][0] <= self.now:
                self._arrive(arrivals[coming][1])
                coming += 1
            self.ledger.settle(self.now)
            self.trace.append((self.now, self.ledger.held, len(self._running)))

    def _speed(self) -> float:
        load = sum(one.busy for one in self._running.values()) if self._is_shared else 0.0
        return 1.0 / max(1.0, load)

    def _until_next(self) -> float:
        """Seconds until a leg ends, or the pace lets the next request start."""
        legs = min((one.left for one in self._running.values()), default=math.inf)
        pace = self.ledger.delay(self.now) if self.ledger.queue else 0.0
        return min(legs / self._speed(), pace + 1e-9 if pace > 0.0 else math.inf)

    def _pass(self, seconds: float) -> None:
        gone = seconds * self._speed()
        self.now += seconds
        for one in list(self._running.values()):
            one.left -= gone
            if one.left <= 1e-9:
                self._end_leg(one)

    def _end_leg(self, one: _Running) -> None:
        request = one.request
        del self._running[id(request)]
        if request.granted < len(request.demand):
            self.ledger.end_leg(request, request.done, self.now)
            return
        self.ledger.finish(request, self.now)
        self.ends.append(self.now)
        self.times.append(self.now - one.came)

    def _arrive(self, kind: Kind) -> None:
        kind = kind if self._is_staggered else kind.at_once()
        if kind.demand.peak > self.ledger.num_pages:
            self.never += 1
        elif self._most_waiting is not None and len(self.ledger.queue) >= self._most_waiting:
            self.refused += 1
        else:
            request = Request(kind.demand, kind.pace)
            one = _Running(request, kind, self.now)
            request.wake = lambda: self._begin_leg(one)
            self.ledger.submit(request)

    def _begin_leg(self, one: _Running) -> None:
        leg = one.request.done
        one.left = float(one.kind.seconds[leg] * math.exp(JITTER * self._chance.normal()))
        one.busy = float(one.kind.busy[leg])
        self._running[id(one.request)] = one


@dataclass(eq=False)
class _Running:
    """left: seconds of its leg, at full speed. busy: the share in which the device computes."""

    request: Request
    kind: Kind
    came: float
    left: float = 0.0
    busy: float = 0.0
