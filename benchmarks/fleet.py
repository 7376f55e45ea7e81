"""Admission in simulated time, on the demand curves of plans and with the ledger that serves real
generations: what a card carries at once, and a day of a fleet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.fleet_card import JITTER, STEP_SECONDS, Card, Kind, kind_of
from kvruntime.admission.ledger import Ledger, Request
from kvruntime.planning import Plan, plan

CLOCKS = {"device": 0.0, "steps": STEP_SECONDS}
POLICIES: dict[str, tuple[str, float | str, str | None]] = {
    "full": ("full", 1.0, None),
    "ams_kv 10 %": ("ams_kv", 0.10, None),
    "scalekv 10 %": ("scalekv", 0.10, None),
    "centroid int4 2 %": ("centroid", "2%", "int4"),
}
FAVOURITES = ("full", "scalekv 10 %", "centroid int4 2 %")  # of the day
PEAKS = (4, 8, 16, 32)  # that the pool holds; the quick ones are less
CARDS, HOUR_SECONDS = 4, 600.0  # simulated; of each hour
PAGES_BYTES = 50 * 10**9  # of an 80 GB card beside Infinity-8B's 19.5 GB and what it works in
SIZES, SHARES = (1, 2, 4, 8), (0.55, 0.25, 0.15, 0.05)  # pictures of a request
QUEUE = 64  # requests that may wait for a card


def saturated(kind: Kind, peaks: int, is_staggered: bool) -> Card:
    """A card whose pool holds so many peaks, and more requests than there is room for."""
    card = Card(peaks * kind.demand.peak, 0, is_staggered)
    card.run([(0.0, kind)] * (40 * peaks + 80))
    return card


def drawn_at_a_time(card: Card, kind: Kind) -> float:
    """Generations that draw, on average, from what came to its end between a quarter and five
    sixths of the time.
    """
    first, last = len(card.ends) // 4, len(card.ends) * 5 // 6
    rate = (last - first) / (card.ends[last] - card.ends[first])
    return rate * float(kind.seconds.sum()) * math.exp(JITTER**2 / 2)


def decision_seconds(underway: int = 1000) -> float:
    """What one decision takes among so many generations, of which half wait."""
    kind = kind_of(plan("infinity-2b", 2, "full", 1.0), 0.0)
    requests = [Request(kind.demand, kind.pace) for _ in range(underway)]
    legs, peak = len(kind.demand), kind.demand.peak
    ledger = Ledger(underway * peak)
    for number, request in enumerate(requests):
        ledger.submit(request)
        ledger.settle(0.0)
        request.done, request.granted = ((number * legs) // underway,) * 2
        request.granted += number % 2
    ledger.num_pages = max(ledger.held, peak) + peak  # now half of them cannot go on
    times = []
    for _ in range(21):
        began = time.perf_counter()
        ledger.settle(1.0)
        times.append(time.perf_counter() - began)
    return median(times)


def a_day(policy: str, is_staggered: bool, cards: int, seconds: float) -> dict[str, Any]:
    """``cards`` cards with Infinity-8B through the hours of a day, each ``seconds`` long, waves of
    requests of 1 to 8 pictures: at the quietest hour a tenth, at the busiest nine tenths of what
    the device could compute if nothing ever waited for pages. Cards draw alike, whatever the
    policy, and share nothing: so many more of them would each see the same.
    """
    kinds = [_request_of(policy, pictures) for pictures in SIZES]
    busy = sum(
        share * kind.device_seconds
        for share, kind in zip(SHARES, (_request_of("full", one) for one in SIZES), strict=True)
    )
    took, refused, never, came = list[float](), 0, 0, 0
    page = _planned(policy, 2)
    num_pages = PAGES_BYTES // (page.bytes_per_page + page.plane_bytes_per_page)
    for number in range(cards):
        card = Card(num_pages, number, is_staggered, is_shared=True, most_waiting=QUEUE)
        chance = np.random.default_rng(1000 + number)
        arrivals: list[tuple[float, Kind]] = []
        for hour in range(24):
            load = 0.5 - 0.4 * math.cos(2 * math.pi * hour / 24)
            times = hour * seconds + seconds * chance.random(chance.poisson(load * seconds / busy))
            sizes = chance.choice(len(SIZES), times.size, p=SHARES)
            arrivals += zip(sorted(times.tolist()), (kinds[size] for size in sizes), strict=True)
        card.run(arrivals)
        took += card.times
        refused, never, came = refused + card.refused, never + card.never, came + len(arrivals)
    return {
        "policy": policy,
        "is_staggered": is_staggered,
        "came": came,
        "never_fit_share": never / came,
        "refused_share": refused / came,
        "seconds_median": float(np.median(took)),
        "seconds_p99": float(np.quantile(took, 0.99)),
    }


@lru_cache(maxsize=64)
def _planned(policy: str, rows: int, model: str = "infinity-8b") -> Plan:
    name, budget, kv_dtype = POLICIES[policy]
    return plan(model, rows, name, budget, kv_dtype=kv_dtype)


def _request_of(policy: str, pictures: int) -> Kind:
    return kind_of(_planned(policy, 2 * pictures), STEP_SECONDS)


def run(progress: Progress, peaks: Sequence[int], cards: int, seconds: float) -> dict[str, Any]:
    """Everything; see benchmarks.schemas.Fleet."""
    rules = (False, True)
    todo = len(POLICIES) * len(CLOCKS) * len(peaks) + 2 * len(FAVOURITES)
    bar = progress.add_task("simulating", total=todo)
    carried = []
    for policy in POLICIES:
        for clock, step_seconds in CLOCKS.items():
            kind = kind_of(_planned(policy, 2, "infinity-2b"), step_seconds)
            for count in peaks:
                bound = count * kind.demand.peak / kind.mean
                reserved, staggered = (
                    drawn_at_a_time(saturated(kind, count, one), kind) for one in rules
                )
                carried.append(
                    {
                        "policy": policy,
                        "clock": clock,
                        "peaks": count,
                        "reserved": reserved,
                        "staggered": staggered,
                        "ratio": staggered / reserved,
                        "bound": bound,
                        "share_of_bound": staggered / bound,
                    }
                )
                progress.advance(bar)
    day = []
    for policy in FAVOURITES:
        for is_staggered in rules:
            day.append(a_day(policy, is_staggered, cards, seconds))
            progress.advance(bar)
    return {"decision_us": 1e6 * decision_seconds(), "carried": carried, "day": day}
