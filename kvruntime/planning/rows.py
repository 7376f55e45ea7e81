"""How many rows fit in so much memory, and what to change where they do not."""

from __future__ import annotations

from collections.abc import Callable

from kvruntime.errors import WillNeverFit
from kvruntime.planning.demand import Plan
from kvruntime.sizes import largest

_AHEAD = 64  # rows that are looked at behind the last that a bisection found
MAX_ROWS = 2**20  # no search goes beyond; a schedule of one scale caches nothing


def max_rows(
    plan: Plan,
    memory: int,
    reserved: int = 0,
    plan_for: Callable[[int], Plan] | None = None,
) -> int:
    """The most rows of such a generation whose pages and workspace fit in ``memory`` bytes less
    ``reserved``, up to MAX_ROWS; 0 if none do.

    plan_for: the plan of so many rows, where it is not that of other rows with as many tokens: a
    budget in bytes of a generation buys more rows fewer tokens.
    """
    room, make = memory - reserved, plan_for or plan.for_rows

    def fits(rows: int) -> bool:
        try:
            return make(rows).total_bytes <= room
        except WillNeverFit:
            return False

    beyond = 1
    while beyond <= MAX_ROWS and fits(beyond):
        beyond *= 2
    most = largest(fits, beyond // 2, min(beyond, MAX_ROWS + 1))
    if plan_for is None:  # one more row may need less, where rows go through a step in chunks
        ahead = range(most + 1, min(most + _AHEAD, MAX_ROWS) + 1)
        most = max((rows for rows in ahead if fits(rows)), default=most)
    return most


def require(
    plan: Plan,
    memory: int,
    reserved: int = 0,
    plan_for: Callable[[int], Plan] | None = None,
) -> None:
    """Raise WillNeverFit, with what to change, unless this plan fits. plan_for: see max_rows."""
    if plan.total_bytes > memory - reserved:
        fits = min(max_rows(plan, memory, reserved, plan_for), plan.rows - 1)
        advice = (
            f"{fits} of {plan.rows} rows would fit"
            if fits
            else "not one row fits: lower the budget, the resolution or the workspace"
        )
        raise WillNeverFit(plan.total_bytes, memory - reserved, advice)
