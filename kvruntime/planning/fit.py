"""From options to a plan, budgets in bytes included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from kvruntime.errors import WillNeverFit
from kvruntime.options import CacheOptions
from kvruntime.planning.baseline import history_bytes
from kvruntime.planning.demand import WORKSPACE_LIMIT, Plan
from kvruntime.planning.formats import formats_of, rounding, stages_of
from kvruntime.planning.positions import Positions
from kvruntime.sizes import largest, parse_bytes, parse_share, rows_by_scale
from kvruntime.storage.layout import (
    MOST_QUANTISED_TOKENS,
    PLANE_BYTES,
    CodedFormat,
    PageLayout,
    Records,
    exact_page_size,
    exact_unit_bytes,
    fitting_page_size,
    stored_bytes,
)
from policies import (
    ORIGIN,
    PLANES,
    Allocation,
    CacheGeometry,
    Policy,
    Problem,
    ScaleSchedule,
    check_allocation,
)

# of the most that any size of transform-coded pages holds: then what is rounded matters more
ENOUGH_TOKENS = 0.95


def default_page_size(schedule: ScaleSchedule) -> int:
    """16 tokens where the whole history is short (64-token pages waste half of it), else 64."""
    return 16 if schedule.history < 1024 else 64


def make_plan(
    geometry: CacheGeometry,
    schedule: ScaleSchedule,
    policy: Policy,
    options: CacheOptions,
    rows: int,
    *,
    rows_from: Mapping[int, int] | None = None,
    page_bytes: int | None = None,
    plane_bytes: int | None = None,
    workspace_limit: int = WORKSPACE_LIMIT,
    own: CacheGeometry | None = None,
) -> Plan:
    """The plan of one generation of ``rows`` rows. Allocates no tensor.

    rows_from: {scale: rows from there on}, for samplers that drop or repeat rows half way. own:
    what the model's own cache would hold, where its number formats are others.
    page_bytes, plane_bytes: of the pages of a pool that is there already; None: pages as the
    options want them.
    A budget in bytes is solved for the most tokens whose pages, at the peak, take no more, by
    bisection: where a few more tokens need fewer pages (a format that begins earlier), those may be
    missed. A share is one of each row's history, so rows that go leave the others' tokens alone; a
    size is one of the generation, so they leave them more.
    Raises ValueError for options that do not fit this model, and WillNeverFit for a budget in bytes
    that not even the smallest allocation keeps to.
    """
    constant = rows_by_scale(len(schedule), rows)
    planned = rows_by_scale(len(schedule), rows, rows_from)
    solved = planned if options.is_shared_by_rows else constant
    limit = workspace_limit if options.workspace is None else int(options.workspace)

    def build(tokens: int, page_size: int) -> Plan:
        return _build(
            geometry,
            schedule,
            policy,
            options,
            solved,
            tokens,
            page_size,
            page_bytes,
            plane_bytes,
            limit,
        )

    sizes = _page_sizes(geometry, schedule, options, page_bytes)
    if not isinstance(options.budget, str):
        made = build(schedule.resolve(options.budget), sizes[0])
        return replace(made, rows_by_scale=planned, own=own)
    share = parse_share(options.budget)
    if share is not None:
        most = int(share * history_bytes(geometry, schedule, 1)) * rows
    else:
        most = parse_bytes(options.budget)
    plans = [_most_tokens(build, size, schedule, most) for size in sizes]
    fitting = [plan for plan in plans if plan.page_bytes <= most]
    if not fitting:
        least = min(plans, key=lambda plan: plan.page_bytes)
        raise WillNeverFit(
            least.page_bytes,
            most,
            f"{policy.name} cannot keep fewer than {least.tokens.max()} tokens of a lane, in "
            f"pages of {least.page_size}: raise the budget, or ask for a kv_dtype or smaller pages",
        )
    return replace(_best_of(fitting), rows_by_scale=planned, own=own)


def _best_of(plans: list[Plan]) -> Plan:
    """Of those with the most tokens the one that rounds least; of transform-coded ones, which have
    many formats, of those with nearly the most.
    """
    enough = float(max(plan.budget_tokens for plan in plans))
    if isinstance(plans[0].records, CodedFormat):
        enough *= ENOUGH_TOKENS

    def merit(plan: Plan) -> tuple[float, ...]:
        return -rounding(plan.formats, plan.stage), plan.budget_tokens, plan.page_size

    return max((plan for plan in plans if plan.budget_tokens >= enough), key=merit)


def _page_sizes(
    geometry: CacheGeometry,
    schedule: ScaleSchedule,
    options: CacheOptions,
    page_bytes: int | None,
) -> list[int]:
    """Page sizes to choose from."""
    if options.page_size is not None:
        return [options.page_size]
    if page_bytes is not None:
        return [_in_pages(geometry, options.records, page_bytes)]
    size = default_page_size(schedule)
    if not isinstance(options.budget, str):
        return [size]
    # half-empty pages cost most where lanes are short; long ones keep what the paged kernel reads
    sizes = range(4, 25) if size < 64 else range(16, 65, 16)
    return [size for size in sizes if _holds_exact_tokens(geometry, options, size)]


def _in_pages(geometry: CacheGeometry, records: Records | None, page_bytes: int) -> int:
    """Tokens of a pool's pages, once they are quantised (if they ever are)."""
    stored, unit = (
        stored_bytes(geometry, records) // 2,
        4 if records else exact_unit_bytes(geometry),
    )
    size = fitting_page_size(page_bytes // 2, stored, unit)
    if records is not None:
        size = min(size, MOST_QUANTISED_TOKENS)
    while page_bytes // 2 % (size * unit):
        size -= 1
    return size


def _exact_in_pages(
    geometry: CacheGeometry, records: Records | None, page_size: int, page_bytes: int
) -> int:
    """Exact tokens in a pool's pages that hold ``page_size`` tokens in the end. Raises ValueError
    where one or the other does not fit.
    """
    half, unit = page_bytes // 2, exact_unit_bytes(geometry)
    PageLayout(page_size, half, geometry.head_dim, geometry.key_dtype, records)
    if records is None:
        return page_size
    if page_size * stored_bytes(geometry, records) == page_bytes:
        return exact_page_size(geometry, records, page_size)
    return fitting_page_size(half, unit * geometry.head_dim, unit)


def _holds_exact_tokens(geometry: CacheGeometry, options: CacheOptions, page_size: int) -> bool:
    try:
        exact_page_size(geometry, options.records, page_size)
    except ValueError:
        return False
    return True


def _most_tokens(
    build: Callable[[int, int], Plan], page_size: int, schedule: ScaleSchedule, most: int
) -> Plan:
    """The plan with most tokens whose pages take at most ``most`` bytes; the smallest one that the
    policy accepts if none does.
    """
    build(schedule.total, page_size)  # what this refuses is not a matter of tokens

    def is_refused(tokens: int) -> bool:
        try:
            build(tokens, page_size)
        except ValueError:
            return True
        return False

    least = 1 + largest(is_refused, 0, schedule.total)
    fits = largest(
        lambda tokens: build(tokens, page_size).page_bytes <= most, least, schedule.total + 1
    )
    return build(fits, page_size)


def _build(
    geometry: CacheGeometry,
    schedule: ScaleSchedule,
    policy: Policy,
    options: CacheOptions,
    by_scale: tuple[int, ...],
    tokens: int,
    page_size: int,
    page_bytes: int | None,
    plane_bytes: int | None,
    workspace_limit: int,
) -> Plan:
    records = options.records
    if records is not None and page_size > MOST_QUANTISED_TOKENS:
        raise ValueError(
            f"quantised pages hold at most {MOST_QUANTISED_TOKENS} tokens, got {page_size}"
        )
    if page_bytes is None:
        exact = exact_page_size(geometry, records, page_size)
        page_bytes = page_size * stored_bytes(geometry, records)
    else:
        exact = _exact_in_pages(geometry, records, page_size, page_bytes)
    problem = Problem(geometry, schedule, tokens)
    if schedule.history:
        allocation = policy.allocate(problem)
        check_allocation(allocation, problem)
    else:  # a single scale caches nothing, whatever the budget
        shape = (len(schedule), geometry.layers, geometry.heads)
        allocation = Allocation(np.zeros(shape, dtype=np.int64))
    formats = formats_of(geometry, records, page_size, exact, page_bytes)
    stage = stages_of(allocation, options, formats)
    wanted = {*policy.needs.planes, *(ORIGIN if options.provenance else ())}
    planes = tuple(plane for plane in PLANES if plane in wanted)
    needed = max(each.page_size for each in formats) * PLANE_BYTES * len(planes)
    if plane_bytes is None:
        plane_bytes = needed
    elif plane_bytes < needed:
        raise ValueError(
            f"policy {policy.name} needs {needed} bytes of planes in a page, the pool has "
            f"{plane_bytes}: make it with Pool(plane_bytes={needed})"
        )
    return Plan(
        geometry=geometry,
        schedule=schedule,
        policy=policy,
        budget_tokens=tokens,
        rows_by_scale=by_scale,
        workspace_limit=workspace_limit,
        tokens=allocation.tokens,
        stage=stage,
        formats=formats,
        bytes_per_page=page_bytes,
        plane_bytes_per_page=plane_bytes,
        planes=planes,
        positions=Positions(policy, problem, allocation.tokens, stage),
        attended=allocation.attended,
    )
