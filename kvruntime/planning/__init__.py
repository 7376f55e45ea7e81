"""What a generation needs, before it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvruntime.catalogue import Model, find_model
from kvruntime.options import CacheOptions
from kvruntime.planning.demand import WORKSPACE_LIMIT, Plan
from kvruntime.planning.fit import make_plan
from kvruntime.planning.roles import choose_policy
from kvruntime.planning.rows import max_rows, require
from kvruntime.sizes import parse_bytes
from policies import Policy


def plan(
    model: str | Model,
    batch: int = 1,
    policy: str | Policy = "scalekv",
    budget: float | str = 0.10,
    *,
    memory: int | str | None = None,
    reserved: int = 0,
    **options: Any,
) -> Plan:
    """What ``batch`` pictures of a catalogue model need with this policy. Needs no weights and no
    GPU. Raises ValueError for what cannot be planned.

    budget: a fraction of the history, a token count, "2%" of the bytes of the model's own history,
    or "512MiB". options: profile, page_size, kv_dtype, kv_groups, kv_start, workspace, as in
    CacheOptions.
    memory: bytes, or "80GiB", that pages and workspace may take beside ``reserved``; raises
    WillNeverFit if they do not fit.
    """
    known = find_model(model) if isinstance(model, str) else model
    if isinstance(batch, bool) or not isinstance(batch, int) or batch <= 0:
        raise ValueError(f"batch must be a positive integer, got {batch!r}")
    if isinstance(reserved, bool) or not isinstance(reserved, int) or reserved < 0:
        raise ValueError(f"reserved must be a number of bytes, got {reserved!r}")
    chosen = CacheOptions(policy=policy, budget=budget, **options)
    plan_for = planner(known, chosen)
    made = plan_for(batch * known.rows_per_picture)
    if memory is not None:
        size = parse_bytes(memory) if isinstance(memory, str) else memory
        require(made, size, reserved, plan_for if chosen.is_shared_by_rows else None)
    return made


def planner(model: Model, options: CacheOptions) -> Callable[[int], Plan]:
    """What so many rows of a catalogue model need with these options."""
    policy, _ = choose_policy(options, model.geometry, model.schedule)
    return lambda rows: make_plan(model.geometry, model.schedule, policy, options, rows)


__all__ = [
    "WORKSPACE_LIMIT",
    "Plan",
    "choose_policy",
    "make_plan",
    "max_rows",
    "plan",
    "planner",
    "require",
]
