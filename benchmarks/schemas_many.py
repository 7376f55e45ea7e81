"""What the benchmarks of many generations write."""

from __future__ import annotations

from benchmarks.strict import Strict


class Soak(Strict):
    """resident_slope_bytes: what the process grows by with a generation, once it is warm."""

    generations: int
    seed: int
    ended: dict[str, int]
    waited: int
    violations: int
    leaked_pages: int
    resident_slope_bytes: float
    resident_mib: float


class Fit(Strict):
    policy: str
    rows: int
    times_own: float
    used_bytes: int
    planned_bytes: int


class Capacity(Strict):
    """cap_bytes: measured of ``own_rows`` rows of an own cache, the copies that torch.cat makes
    included. fits: rows that a pool of so many bytes holds, drawn to the end.
    """

    model: str
    resolution: str
    cap_bytes: int
    own_rows: int
    own_planned_bytes: int
    fits: list[Fit]


class ProcessFit(Strict):
    """Most pictures with this cache, bytes of the process that drew them by kind, and how the
    attempt at more ended. rest: what layers compute, and what the allocator keeps.
    """

    cache: str
    pictures: int
    times_own: float
    bytes: dict[str, int]
    more: str


class Process(Strict):
    """growth_bytes: that the operating system lets the process grow by, once the model is there."""

    model: str
    growth_bytes: int
    fits: list[ProcessFit]


class Carried(Strict):
    """A pool of so many ``peaks`` with more requests than room. Generations that draw at a time:
    where each reserves its peak, where they are staggered, and at most (peak / mean). ratio:
    of the two.
    """

    policy: str
    clock: str
    peaks: int
    reserved: float
    staggered: float
    ratio: float
    bound: float
    share_of_bound: float


class Day(Strict):
    """seconds: from a request's arrival to its pictures."""

    policy: str
    is_staggered: bool
    came: int
    never_fit_share: float
    refused_share: float
    seconds_median: float
    seconds_p99: float


class Fleet(Strict):
    decision_us: float
    carried: list[Carried]
    day: list[Day]


class Stress(Strict):
    """All of them."""

    capacity: Capacity
    process: Process
    soak: Soak
    fleet: Fleet
