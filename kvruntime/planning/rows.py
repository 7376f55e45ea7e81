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
    """The most rows that such a generation may begin with whose pages and workspace fit in
    ``memory`` bytes less ``reserved``, up to MAX_ROWS; 0 if none do.

    plan_for: the plan of so many rows, where it is not that of other rows with as many tokens: a
    budget in bytes of a generation buys more rows fewer tokens.
    """
    looks_ahead = plan_for is None and not plan.branches
    return _most(plan_for or plan.as_large_for, memory - reserved, MAX_ROWS, looks_ahead)


def require(
    plan: Plan,
    memory: int,
    reserved: int = 0,
    plan_for: Callable[[int], Plan] | None = None,
) -> None:
    """Raise WillNeverFit, with what to change, unless this plan fits. plan_for: see max_rows."""
    room = memory - reserved
    if plan.total_bytes > room:
        looks_ahead = plan_for is None and not plan.branches
        fits = _most(plan_for or plan.as_large_for, room, plan.rows - 1, looks_ahead)
        advice = (
            f"{fits} of {plan.rows} rows would fit"
            if fits
            else "not one row fits: lower the budget, the resolution or the workspace"
            + (", or repeat rows less often" if plan.branches else "")
        )
        raise WillNeverFit(plan.total_bytes, room, advice)


def _most(plan_for: Callable[[int], Plan], room: int, most: int, looks_ahead: bool) -> int:
    """The most rows, up to ``most``, whose plan takes at most ``room`` bytes; 0 if none does."""

    def needs(rows: int) -> int:
        return plan_for(rows).total_bytes

    found = most_that_fit(needs, room, most)
    if looks_ahead:  # one more row may need less, where rows go through a step in chunks
        ahead = range(found + 1, min(found + _AHEAD, most) + 1)
        found = max((rows for rows in ahead if _fits(needs, rows, room)), default=found)
    return found


def most_that_fit(needs: Callable[[int], int], room: int, most: int) -> int:
    """The most, up to ``most``, that fit, of ``needs(count)`` bytes; 0 if not one does. By doubling
    and bisection; what ``needs`` refuses with WillNeverFit does not fit.
    """
    beyond = 1
    while beyond <= most and _fits(needs, beyond, room):
        beyond *= 2
    return largest(lambda count: _fits(needs, count, room), beyond // 2, min(beyond, most + 1))


def _fits(needs: Callable[[int], int], count: int, room: int) -> bool:
    try:
        return needs(count) <= room
    except WillNeverFit:
        return False
