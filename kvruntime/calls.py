"""What a generation refuses: calls that do not follow its plan. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvruntime.arguments import check_tensor, refuse_transposed, row_numbers
from kvruntime.errors import ScheduleError
from kvruntime.planning.demand import Plan
from kvruntime.planning.shapes import Kind
from kvruntime.sizes import check_positive
from policies import TORCH_DTYPES


class Place(NamedTuple):
    """What the next step is for. copies: rows that each row must become before."""

    scale: int
    layer: int
    rows: int
    copies: int


def check_call(
    plan: Plan, place: Place, device: torch.device, layer: int, q: Tensor, k: Tensor, v: Tensor
) -> None:
    """Raise ScheduleError or ValueError unless this step of ``attend`` is the next one."""
    if q.ndim != 4:
        raise ValueError(f"q must be [rows, n, heads, head_dim], got {tuple(q.shape)}")
    shape = _next_shape(plan, place)
    for name, part in (("q", q), ("k", k), ("v", v)):
        refuse_transposed(name, part, shape)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(f"layer must be an int, got {layer!r}")
    if (layer, *q.shape[:2]) != (place.layer, *shape[:2]):
        raise ScheduleError(
            f"scale {place.scale} expects layer {place.layer} with {shape[0]} rows "
            f"of {shape[1]} tokens, "
            f"got layer {layer} with {q.shape[0]} rows of {q.shape[1]}"
        )
    dtype = TORCH_DTYPES[plan.geometry.key_dtype]
    for name, part in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, part, shape, dtype, device)


def check_append(
    plan: Plan,
    place: Place,
    device: torch.device,
    scale: int,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
) -> None:
    """Raise ScheduleError or ValueError unless this whole scale may be appended now."""
    shape = _next_shape(plan, place)
    if isinstance(scale, bool) or scale != place.scale:
        raise ScheduleError(f"append() of scale {scale}: the next one is {place.scale}")
    layers, dtype = plan.geometry.layers, TORCH_DTYPES[plan.geometry.key_dtype]
    if (len(k), len(v)) != (layers, layers):
        raise ValueError(
            f"k and v are one tensor for each of {layers} layers, got {len(k)}, {len(v)}"
        )
    kinds = [plan.shape(scale, number, 1).kind for number in range(layers)]
    if Kind.CHOOSE in kinds or Kind.FOLD in kinds:
        raise ScheduleError(
            f"policy {plan.policy.name} chooses by the queries of scale {scale}, and append() has "
            "none: draw that scale, raise the budget, or take a policy that looks at no queries"
        )
    for number in range(layers):
        for name, part in ((f"k[{number}]", k[number]), (f"v[{number}]", v[number])):
            refuse_transposed(name, part, shape)
            check_tensor(name, part, shape, dtype, device)


def check_branch(place: Place, count: int) -> None:
    """Raise ScheduleError or ValueError unless each row becomes ``count`` rows here by the plan."""
    check_positive("count", count)
    if place.copies == count == 1:
        return
    if place.copies == 1:
        raise ScheduleError(
            f"no row is repeated at scale {place.scale} by the plan: open(rows, "
            f"{{{place.scale}: {count} * rows}})"
        )
    if count != place.copies:
        raise ValueError(
            f"scale {place.scale} is planned with {place.copies} rows for each, got {count}"
        )


def check_rows(
    plan: Plan, place: Place, rows: int | Sequence[int] | NDArray[Any] | Tensor
) -> NDArray[np.int64]:
    """Numbers of the rows that ``keep_rows`` keeps. Raises ScheduleError or ValueError."""
    if plan.copies(place.scale) > 1:
        raise ScheduleError(f"rows are repeated at scale {place.scale}: keep_rows() elsewhere")
    kept = row_numbers(rows, place.rows)
    planned = plan.rows_by_scale[place.scale :]
    if planned and kept.size > planned[0]:
        raise ValueError(
            f"{planned[0]} rows are planned from scale {place.scale} on, got {kept.size}"
        )
    return kept


def check_promised(before: Plan, after: Plan, scale: int, at_once: bool) -> None:
    """Raise ValueError where the rows that are left may need pages that were not planned. at_once:
    whether all pages of the peak are reserved; else those of each step are promised.
    """
    promised, needed = (plan.occupancy.within[scale:] for plan in (before, after))
    if at_once:
        most = before.peak_pages_from(scale)
        promised, needed = np.array([most]), np.array([after.peak_pages_from(scale)])
    if (needed > promised).any():
        raise ValueError(
            f"these rows share too little: they need {int(needed.max())} pages, {promised.max()} "
            "are planned for as many of the first ones; keep those, or do not plan that rows go"
        )


def _next_shape(plan: Plan, place: Place) -> tuple[int, int, int, int]:
    """[rows, n, heads, head_dim] of the next step. Raises ScheduleError where there is none."""
    if place.scale == len(plan.schedule):
        raise ScheduleError(f"all {place.scale} scales are done: close() and open() again")
    planned = plan.rows_by_scale[place.scale]
    if planned < place.rows:
        raise ScheduleError(
            f"scale {place.scale} is planned with {planned} rows and there are {place.rows}: "
            "keep_rows() goes first"
        )
    if place.copies > 1:
        raise ScheduleError(
            f"scale {place.scale} is planned with {place.copies} rows for each of {place.rows}: "
            f"branch({place.copies}) goes first"
        )
    tokens = plan.schedule.tokens[place.scale]
    return (place.rows, tokens, plan.geometry.heads, plan.geometry.head_dim)
